"""The first rows of a JSON array, without reading the rest of a large one."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_tune.data.files import READ_ERRORS, DataFile, RawExample, RowMask, open_binary, open_file, row_of
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.errors import UserError

FIRST_BYTES = 1 << 20
BETWEEN = re.compile(r"[ \t\r\n,]*")  # two values; it matches everywhere
GROWTH = 4  # how much more is read where not even one row ends within what was read


class ArrayHead:
    """The rows that end within the first megabyte of a JSON array; at least one, however long it is."""

    def __init__(self, path: Path, name: str, is_gz: bool) -> None:
        self.path = path
        self.name = name
        self.is_gz = is_gz

    def lines(self) -> Iterator[int]:
        return (line for line, _ in self.rows(None))

    def rows(self, mask: RowMask) -> Iterator[tuple[int, RawExample | InvalidRow]]:
        assert mask is None, "rows are picked from whole files"
        size = FIRST_BYTES
        while True:
            data = self._read(size)
            if len(data) < size:  # a small array is read like any other, with the same faults
                yield from open_file(self.path, self.name).rows(None)
                return
            if values := first_values(self._decode(data)):
                yield from ((number, row_of(value)) for number, value in enumerate(values, start=1))
                return
            size *= GROWTH

    def content_key(self) -> str:
        raise AssertionError("nothing is kept that was made of a part of a file")

    def _read(self, size: int) -> bytes:
        try:
            with open_binary(self.path, self.is_gz) as file:
                return file.read(size)
        except READ_ERRORS as error:
            raise UserError(f"{self.name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error

    def _decode(self, data: bytes) -> str:
        try:
            return codecs.getincrementaldecoder("utf-8-sig")().decode(data)  # the cut may be within a character
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: the JSON array cannot be read ({error})") from error


def open_array_head(path: Path, name: str, is_gz: bool) -> DataFile:
    """The first rows of a JSON array as a file."""
    return ArrayHead(path, name, is_gz)


def first_values(text: str) -> list[Any]:
    """The values that are whole in the beginning of a JSON array."""
    decoder = json.JSONDecoder()
    values = list[Any]()
    position = text.index("[") + 1
    while between := BETWEEN.match(text, position):
        try:
            value, position = decoder.raw_decode(text, between.end())
        except (ValueError, RecursionError):  # the cut, the end of the array, or a fault that the whole reader reports
            return values
        values.append(value)
    return values
