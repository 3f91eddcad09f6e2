"""The first rows of a source: enough to see what it contains, without reading or counting the others."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lowrank_tune.config import SourceConfig
from lowrank_tune.data.files import (
    DataFile,
    LocalFile,
    NumberedRows,
    RowMask,
    open_file,
    row_of,
)
from lowrank_tune.data.sources import (
    BUILTIN_DATASETS,
    HEAD_ROWS,
    BuiltinRows,
    LocatedRow,
    RowLocation,
    empty_source,
    open_local_files,
)
from lowrank_tune.errors import UserError

FIRST_BYTES = 1 << 20
GROWTH = 4
"""How much more is read if not even one row ends within what was read."""
BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")


class SourceHead:
    """The first rows of files. Each iteration reads them again, and only as far as it goes."""

    def __init__(
        self,
        name: str,
        files: Sequence[DataFile],
    ) -> None:
        self.name = name
        self._files = tuple(files)

    def __iter__(self) -> Iterator[LocatedRow]:
        return islice(self._rows(), HEAD_ROWS)

    def _rows(self) -> Iterator[LocatedRow]:
        for file in self._files:
            for line, row in file.rows(None):
                yield RowLocation(file.name, line), row


def read_head(source: SourceConfig, seed: int) -> SourceHead:
    """Returns the first rows of a source that is not a data set of the hub. Raises UserError if it is missing, cannot
    be read, or is empty."""
    if source.dataset in BUILTIN_DATASETS:
        max_samples = source.max_samples and min(source.max_samples, HEAD_ROWS)
        few = source.model_copy(update={"max_samples": max_samples})
        return SourceHead(source.dataset, [BuiltinRows(few, seed)])
    head = SourceHead(source.dataset, open_local_files(source, ArrayHead))
    if next(iter(head), None) is None:
        raise empty_source(source.dataset)
    return head


class ArrayHead(LocalFile):
    """The rows that end within the first megabyte of a JSON array; at least one, however long it is."""

    def count_rows(self) -> int:
        raise AssertionError("the first rows are not counted")

    def rows(self, mask: RowMask) -> NumberedRows:
        assert mask is None, "rows are drawn from whole files"
        size = FIRST_BYTES
        while True:
            data = self._read(size)
            if len(data) < size:
                # A small array is read by the usual reader, and has the same faults.
                yield from open_file(self.path, self.name).rows(None)
                return
            values = first_values(self._decode(data))
            if values:
                for number, value in enumerate(values, start=1):
                    yield number, row_of(value)
                return
            size *= GROWTH

    def content_key(self) -> str:
        raise AssertionError("no cache is made from a part of a file")

    def _read(self, size: int) -> bytes:
        with self.reading("cannot be read") as file:
            return file.read(size)

    def _decode(self, data: bytes) -> str:
        # An incremental decoder accepts data that ends within a character.
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            return decoder.decode(data)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: the JSON array cannot be read ({error})") from error


def first_values(text: str) -> list[Any]:
    """Returns the values that are complete in the beginning of a JSON array."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    position = text.index("[") + 1
    while True:
        # The pattern matches everywhere, if only the empty text.
        between = BETWEEN_VALUES.match(text, position)
        assert between is not None
        try:
            value, position = decoder.raw_decode(text, between.end())
        except (ValueError, RecursionError):
            # The end of `text` or of the array, or a fault, which the reader of the whole file reports.
            return values
        values.append(value)
