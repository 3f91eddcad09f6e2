"""Readers of local files, chosen by the first bytes of a file. Only a JSON array is held whole as Python objects.

A line that is not JSON is a fault of that row, not of the file.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.data.formats import InvalidRow, RawRowOrFault
from lowrank_tune.errors import UserError
from lowrank_tune.json_files import parse_json
from lowrank_tune.regular_files import check_regular_file

T = TypeVar("T")
RowMask = NDArray[np.bool_] | None
"""Which rows are drawn, by their index; None for all."""
NumberedRows = Iterator[tuple[int, RawRowOrFault]]
"""Rows with their lines, or their numbers from 1."""
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (
    *JSON_SUFFIXES,
    ".csv",
    ".tsv",
    ".parquet",
)
BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
FIRST_BYTES = 4096
READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file may raise, also a gzipped one that is truncated or damaged."""


class DataFile(Protocol):
    """One file, or one data set of the hub."""

    name: str

    def count_rows(self) -> int:
        """Returns the number of rows, without parsing them if possible."""
        ...

    def rows(self, mask: RowMask) -> NumberedRows:
        """Yields the drawn rows with their lines."""
        ...

    def content_key(self) -> str:
        """Returns a key that changes with the contents."""
        ...


def select_rows(rows: Iterable[T], mask: RowMask) -> Iterator[T]:
    """Yields the drawn rows."""
    if mask is None:
        return iter(rows)
    return compress(rows, mask.data)


OpenArray = Callable[[Path, str, bool], DataFile]
"""Opens a file that begins like a JSON array; has the arguments of `LocalFile`."""


def open_file(
    path: Path,
    name: str,
    open_array: OpenArray | None = None,
) -> DataFile:
    """Returns the reader of a file, by its first bytes. `open_array` opens JSON arrays; by default the whole array is
    read. Raises UserError."""
    with read_errors_as_user_errors(name, "cannot be read"):
        # A file is read several times, which a pipe does not allow.
        check_regular_file(path)
        with path.open("rb") as file:
            is_gz = file.read(2) == b"\x1f\x8b"
        start = _first_bytes(path, is_gz)
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        if start.startswith(UTF16_BOMS):
            raise UserError(f"{name}: it is written in UTF-16; save it as UTF-8")
        if start.startswith(b"PAR1"):
            return _Parquet(path, name)
        if suffix in (".csv", ".tsv"):
            return _Table(
                path,
                name,
                is_gz,
                "\t" if suffix == ".tsv" else ",",
            )
        first = start.removeprefix(BOM).lstrip()[:1]
        if first == b"[":
            return (open_array or _open_array)(path, name, is_gz)
        if first not in (b"", b"{") and suffix not in JSON_SUFFIXES:
            raise UserError(f"{name}: it is neither JSON lines, a JSON array, CSV (.csv, .tsv) nor Parquet")
        return _JsonLines(path, name, is_gz)


def _first_bytes(path: Path, is_gz: bool) -> bytes:
    """Returns the first block of a file that is not all white space."""
    with open_binary(path, is_gz) as file:
        start = file.read(FIRST_BYTES)
        while not start.strip() and (more := file.read(16 * FIRST_BYTES)):
            start = more
    return start


@contextmanager
def read_errors_as_user_errors(name: str, fault: str) -> Iterator[None]:
    """Raises UserError, with the name of the file and the fault, if reading fails inside."""
    try:
        yield
    except READ_ERRORS as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: {fault} ({cause})") from error


def open_binary(path: Path, is_gz: bool) -> IO[bytes]:
    """Opens a file, gzipped or not, for its contents."""
    if is_gz:
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _open_array(
    path: Path,
    name: str,
    is_gz: bool,
) -> DataFile:
    """Returns the reader of a JSON array; that of JSON lines if more follows the array, so that it is only a line."""
    with open_binary(path, is_gz) as file:
        data = file.read()
    try:
        return _JsonArray(
            path,
            name,
            is_gz,
            parse_json(data.decode("utf-8-sig")),
        )
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _JsonLines(path, name, is_gz)
        raise UserError(
            f"{name}:{error.lineno}: the JSON array is broken here ({error.msg}, column {error.colno})"
        ) from error
    except ValueError as error:
        raise UserError(f"{name}: the JSON array cannot be read ({error})") from error


@dataclass
class LocalFile:
    """A file, its name in messages, and whether it is gzipped."""

    path: Path
    name: str
    is_gz: bool = False

    @contextmanager
    def reading(self, fault: str) -> Iterator[IO[bytes]]:
        """Opens the contents. Raises UserError with the name and the fault if reading fails inside."""
        with read_errors_as_user_errors(self.name, fault), open_binary(self.path, self.is_gz) as file:
            yield file

    def content_key(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()


class _JsonLines(LocalFile):
    """JSON lines. Only the newline byte ends a line: U+2028 and the like may be inside strings."""

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        with self.reading("cannot be read to its end") as file:
            for line, text in enumerate(file, start=1):
                if line == 1:
                    text = text.removeprefix(BOM)
                if text.strip():
                    yield line, text

    def count_rows(self) -> int:
        return sum(1 for _ in self._texts())

    def rows(self, mask: RowMask) -> NumberedRows:
        for line, text in select_rows(self._texts(), mask):
            yield line, parse_line(text)


def parse_line(text: bytes) -> RawRowOrFault:
    """Returns the object of one JSON line, or its fault."""
    try:
        row = parse_json(text.decode())
    except UnicodeDecodeError:
        return InvalidRow("not UTF-8")
    except ValueError:
        # ValueError is also that of a number with thousands of digits.
        return InvalidRow("malformed JSON")
    return row_of(row)


def row_of(value: Any) -> RawRowOrFault:
    """Returns a value of a JSON file as a row, or its fault."""
    if isinstance(value, dict):
        return value
    return InvalidRow("not an object with columns")


@dataclass
class _JsonArray(LocalFile):
    """A JSON array."""

    array: list[Any] = field(default_factory=list)

    def count_rows(self) -> int:
        return len(self.array)

    def rows(self, mask: RowMask) -> NumberedRows:
        for number, value in select_rows(enumerate(self.array, start=1), mask):
            yield number, row_of(value)


@dataclass
class _Table(LocalFile):
    """CSV with a header line."""

    delimiter: str = ","

    def _read(self) -> NumberedRows:
        # Python's own limit for a field is 131,072 characters.
        csv.field_size_limit(sys.maxsize)
        try:
            with self.reading("cannot be read to its end") as file:
                text = io.TextIOWrapper(
                    file,
                    "utf-8-sig",
                    newline="",
                )
                # The fields of a line that is too long are under the key "", those that are missing are None.
                reader = csv.DictReader(
                    text,
                    delimiter=self.delimiter,
                    restkey="",
                    strict=True,
                )
                for row in reader:
                    if "" in row or None in row.values():
                        yield reader.line_num, InvalidRow("a line with fewer or more fields than the header")
                    else:
                        yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{self.name}: not a well-formed CSV file in UTF-8 ({error})") from error

    def count_rows(self) -> int:
        return sum(1 for _ in self._read())

    def rows(self, mask: RowMask) -> NumberedRows:
        return select_rows(self._read(), mask)


@dataclass
class _Parquet(LocalFile):
    """Parquet, a batch of rows at a time."""

    BATCH_ROWS = 1024

    def __post_init__(self) -> None:
        try:
            # Imported only here: other files are read without it (and without datasets, which installs it).
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError as error:
            raise UserError(f"{self.name}: Parquet needs the package pyarrow (`pip install pyarrow`)") from error
        try:
            self._file: Any = pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.name}: not a well-formed Parquet file ({str(error).splitlines()[0]})") from error

    def count_rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def rows(self, mask: RowMask) -> NumberedRows:
        first = 0
        for batch in self._file.iter_batches(batch_size=self.BATCH_ROWS):
            indices = np.arange(len(batch))
            selected = batch
            if mask is not None:
                indices = np.flatnonzero(mask[first : first + len(batch)])
                # Rows that are not drawn never become Python objects.
                selected = batch.take(indices)
            numbers = (first + 1 + indices).tolist()
            yield from zip(
                numbers,
                selected.to_pylist(),
                strict=True,
            )
            first += len(batch)
