"""Readers of local files, chosen by a file's first bytes. No file is held whole as Python objects, but for a JSON
array.

A line that is no JSON is a fault of that row, not of the file.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import compress
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.errors import UserError

T = TypeVar("T")
RawExample = Mapping[str, Any]
RowMask = NDArray[np.bool_] | None
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
BOM = b"\xef\xbb\xbf"
READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file may raise, a gzipped one that is cut off or damaged too."""


class DataFile(Protocol):
    """One file, or one data set."""

    name: str

    def lines(self) -> Iterator[int]:
        """The line of every row, cheaply."""
        ...

    def rows(self, mask: RowMask) -> Iterator[tuple[int, RawExample | InvalidRow]]:
        """Rows with their lines: all, or those that are picked, told by their numbers from 0."""
        ...

    def content_key(self) -> str:
        """Changes with the contents."""
        ...


def select_rows(numbered: Iterable[T], mask: RowMask) -> Iterator[T]:
    """All, or those that are picked."""
    if mask is None:
        return iter(numbered)
    return compress(numbered, mask.data)


OpenArray = Callable[[Path, str, bool], DataFile]
"""Opens a file that begins like a JSON array: its path, its name in messages, and whether it is gzipped."""


def open_file(path: Path, name: str, open_array: OpenArray | None = None) -> DataFile:
    """The reader for a file, by its first bytes. `open_array` is the one for JSON arrays, where it is not the reader of
    the whole array."""
    try:
        with path.open("rb") as file:
            is_gz = file.read(2) == b"\x1f\x8b"
        with open_binary(path, is_gz) as file:
            start = file.read(4096)
            while start.strip() == b"" and (more := file.read(65536)):
                start = more
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{name}: it is written in UTF-16; save it as UTF-8")
        if start.startswith(b"PAR1"):
            return _Parquet(path, name)
        if suffix in (".csv", ".tsv"):
            return _Table(path, name, is_gz, "\t" if suffix == ".tsv" else ",")
        first = start.removeprefix(BOM).lstrip()[:1]
        if first == b"[":
            return (open_array or _open_array)(path, name, is_gz)
        if first not in (b"", b"{") and suffix not in (".json", ".jsonl", ".ndjson"):
            raise UserError(f"{name}: it is neither JSON lines, a JSON array, CSV (.csv, .tsv) nor Parquet")
        return _JsonLines(path, name, is_gz)
    except READ_ERRORS as error:
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def open_binary(path: Path, is_gz: bool) -> IO[bytes]:
    if is_gz:
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _open_array(path: Path, name: str, is_gz: bool) -> DataFile:
    array = _load_array(path, name, is_gz)
    if array is None:
        return _JsonLines(path, name, is_gz)
    return _JsonArray(path, name, array)


def _load_array(path: Path, name: str, is_gz: bool) -> list[Any] | None:
    """The rows of a JSON array; None where more follows the array, so that it was only a line."""
    with open_binary(path, is_gz) as file:
        data = file.read()
    try:
        return cast(list[Any], json.loads(data.decode("utf-8-sig")))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise UserError(
            f"{name}:{error.lineno}: the JSON array is broken here ({error.msg}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: the JSON array cannot be read ({error})") from error


class _File:
    name: str

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name

    def content_key(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()


class _JsonLines(_File):
    """JSON lines. Split on the newline byte alone: U+2028 and the like stand inside strings."""

    def __init__(self, path: Path, name: str, is_gz: bool) -> None:
        super().__init__(path, name)
        self.is_gz = is_gz

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open_binary(self.path, self.is_gz) as file:
                for line, text in enumerate(file, start=1):
                    text = text.removeprefix(BOM) if line == 1 else text
                    if text.strip():
                        yield line, text
        except READ_ERRORS as error:
            raise UserError(
                f"{self.name}: cannot be read to its end ({getattr(error, 'strerror', None) or error})"
            ) from error

    def lines(self) -> Iterator[int]:
        return (line for line, _ in self._texts())

    def rows(self, mask: RowMask) -> Iterator[tuple[int, RawExample | InvalidRow]]:
        return ((line, parse_line(text)) for line, text in select_rows(self._texts(), mask))


def parse_line(text: bytes) -> RawExample | InvalidRow:
    """The object of one JSON line, or what is wrong with it."""
    try:
        row = json.loads(text.decode())
    except UnicodeDecodeError:
        return InvalidRow("not UTF-8")
    except (ValueError, RecursionError):  # ValueError: also a number with thousands of digits
        return InvalidRow("malformed JSON")
    return row_of(row)


def row_of(value: Any) -> RawExample | InvalidRow:
    """A value of a JSON file as a row."""
    if isinstance(value, dict):
        return value
    return InvalidRow("not an object with columns")


class _JsonArray(_File):
    """A JSON array."""

    def __init__(self, path: Path, name: str, array: list[Any]) -> None:
        super().__init__(path, name)
        self.array = array

    def lines(self) -> Iterator[int]:
        return iter(range(1, len(self.array) + 1))

    def rows(self, mask: RowMask) -> Iterator[tuple[int, RawExample | InvalidRow]]:
        for line, row in select_rows(enumerate(self.array, start=1), mask):
            yield line, row_of(row)


class _Table(_File):
    """CSV with a header line."""

    def __init__(self, path: Path, name: str, is_gz: bool, delimiter: str) -> None:
        super().__init__(path, name)
        self.is_gz = is_gz
        self.delimiter = delimiter

    def _read(self) -> Iterator[tuple[int, RawExample | InvalidRow]]:
        csv.field_size_limit(sys.maxsize)  # the limit of 131,072 characters is Python's, not the format's
        try:
            with open_binary(self.path, self.is_gz) as file:
                reader = csv.DictReader(
                    io.TextIOWrapper(file, "utf-8-sig", newline=""),
                    delimiter=self.delimiter,
                    restkey="",
                    strict=True,
                )
                for row in reader:
                    missing = any(value is None for value in row.values())
                    yield (
                        reader.line_num,
                        InvalidRow("a line with fewer or more fields than the header") if missing or "" in row else row,
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{self.name}: not a well-formed CSV file in UTF-8 ({error})") from error
        except READ_ERRORS as error:
            raise UserError(
                f"{self.name}: cannot be read to its end ({getattr(error, 'strerror', None) or error})"
            ) from error

    def lines(self) -> Iterator[int]:
        return (line for line, _ in self._read())

    def rows(self, mask: RowMask) -> Iterator[tuple[int, RawExample | InvalidRow]]:
        return select_rows(self._read(), mask)


class _Parquet(_File):
    """Parquet, a batch of rows at a time."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        try:
            # Only here: the kit works without it (and without datasets, which brings it) on other files.
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError as error:
            raise UserError(f"{name}: Parquet needs the package pyarrow (`pip install pyarrow`)") from error
        try:
            self._file: Any = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{name}: not a well-formed Parquet file ({str(error).splitlines()[0]})") from error

    def lines(self) -> Iterator[int]:
        return iter(range(1, int(self._file.metadata.num_rows) + 1))

    def rows(self, mask: RowMask) -> Iterator[tuple[int, RawExample | InvalidRow]]:
        first = 0
        for batch in self._file.iter_batches(batch_size=1024):
            if mask is None:
                numbers = np.arange(len(batch))
            else:
                numbers = np.flatnonzero(mask[first : first + len(batch)])
            selected = batch if mask is None else batch.take(numbers)  # what is not picked never becomes Python objects
            yield from zip((numbers + first + 1).tolist(), selected.to_pylist(), strict=True)
            first += len(batch)
