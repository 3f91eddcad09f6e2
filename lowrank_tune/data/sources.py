"""Where rows come from: the built-in problems, local files and folders, the hub."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import SourceConfig
from lowrank_tune.data.files import (
    SUFFIXES,
    DataFile,
    NumberedRows,
    OpenArray,
    RowMask,
    open_file,
    select_rows,
)
from lowrank_tune.data.formats import RawRowOrFault
from lowrank_tune.data.hub import HubRows
from lowrank_tune.errors import UserError, did_you_mean
from lowrank_tune.toy import problems

ROWS_SEED_TAG = 4
"""A tag beside those of `sampler` and `prompts`, which separates the random streams."""
BUILTIN_DATASETS = ("builtin:arithmetic", "builtin:arithmetic-preferences")
BUILTIN_SIZES = {"train": 400, "heldout": 200}
HEAD_ROWS = 1000
"""The most rows by which the contents of a source are checked."""


class RowLocation(NamedTuple):
    """Where a row is: a file or data set, and a line from 1 (in an array, a table or a data set the row's number)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


LocatedRow = tuple[RowLocation, RawRowOrFault]
Chunk = Sequence[LocatedRow]


class SourceRows:
    """The rows of a source, all or a draw of them, in their own order.

    A draw is the beginning of one permutation of all rows, so that `refill_dropped` can continue it.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[DataFile],
        count: int | None = None,
        seed: int = 0,
    ) -> None:
        self.name = name
        self._files = tuple(files)
        self._lengths = [file.count_rows() for file in self._files]
        self._start = 0
        self._end = sum(self._lengths)
        self._requested = count
        self._seed = seed
        self._permutation: NDArray[np.int64] | None = None
        if not self._end:
            raise empty_source(name)
        if count is not None and count < self._end:
            self._permutation = np.random.default_rng([ROWS_SEED_TAG, seed]).permutation(self._end)
            self._end = count

    def __len__(self) -> int:
        return self._end - self._start

    def __iter__(self) -> Iterator[LocatedRow]:
        drawn = None
        if self._permutation is not None:
            drawn = np.zeros(len(self._permutation), dtype=np.bool_)
            drawn[self._permutation[self._start : self._end]] = True
        first = 0
        for file, length in zip(self._files, self._lengths, strict=True):
            mask = None if drawn is None else drawn[first : first + length]
            for line, row in file.rows(mask):
                yield RowLocation(file.name, line), row
            first += length

    def refill_dropped(self, used: Callable[[], int]) -> Iterator[SourceRows]:
        """Yields these rows, then as many further ones of the draw as are still missing. `used` returns how many of the
        rows so far could be used."""
        rows = self
        yield rows
        while self._permutation is not None and self._requested is not None:
            missing = min(self._requested - used(), len(self._permutation) - rows._end)
            if missing <= 0:
                return
            rows = copy.copy(rows)
            rows._start = rows._end
            rows._end += missing
            yield rows

    def content_key(self) -> str:
        """Returns a key that changes with the contents of the files, and with the draw."""
        key = " ".join(file.name + file.content_key() for file in self._files)
        if self._permutation is not None:
            key += f" {self._requested} drawn with {self._seed}"
        return key


def empty_source(name: str) -> UserError:
    """Returns the error for a source without rows."""
    return UserError(f"{name}: it is empty; expected JSON lines, a JSON array, CSV or Parquet with at least one row")


def read_source(source: SourceConfig, seed: int) -> SourceRows:
    """Returns the rows of a source. Raises UserError if it is missing or empty."""
    if source.dataset in BUILTIN_DATASETS:
        return SourceRows(source.dataset, [BuiltinRows(source, seed)])
    if is_hub_dataset(source.dataset):
        return SourceRows(
            source.dataset,
            [HubRows(source)],
            source.max_samples,
            seed,
        )
    return SourceRows(
        source.dataset,
        open_local_files(source),
        source.max_samples,
        seed,
    )


def is_hub_dataset(name: str) -> bool:
    """Returns whether a name that is not built in is that of a data set of the hub. Raises UserError for a path that is
    not valid."""
    try:
        return not Path(name).expanduser().exists() and not _looks_like_a_path(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: {error}") from error


def open_local_files(source: SourceConfig, open_array: OpenArray | None = None) -> list[DataFile]:
    """Opens the file of a source, or all data files of its folder, each by `open_file`. Raises UserError."""
    path = Path(source.dataset).expanduser()
    if not path.exists():
        raise UserError(_missing(source.dataset, path))
    for name, value, default in (("name", source.config_name, None), ("split", source.split, "train")):
        if value != default:
            raise UserError(
                f"{source.dataset}: `{name}: {value}` is for data sets of the hub, and this is a local path; name "
                f"the file instead"
            )
    folder = source.dataset.rstrip("/")
    opened = []
    for file in _files(path):
        name = source.dataset if file == path else f"{folder}/{file.relative_to(path)}"
        opened.append(open_file(file, name, open_array))
    return opened


def _looks_like_a_path(name: str) -> bool:
    """Returns whether a name is a path, so that a missing file is never looked up on the hub. Names of the hub may have
    dots, as in `-v1.5`, but no suffix of letters."""
    if name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name:
        return True
    return re.search(r"\.[A-Za-z]{2,8}$", name) is not None


def _missing(name: str, path: Path) -> str:
    folder = path.parent
    message = f"{name}: no such file"
    if not folder.is_dir():
        return f"{message}, and no folder `{folder.name}` either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or _is_data(entry))
    near = did_you_mean(path.name, names)
    if near:
        return message + near
    if names:
        return f"{message}; the folder contains {', '.join(names[:8])}"
    return f"{message}; the folder contains no data files"


def _is_data(path: Path) -> bool:
    if not path.is_file() or path.name.startswith((".", "_")):
        return False
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(entry for entry in path.rglob("*") if _is_data(entry))
    if not files:
        raise UserError(f"{path}: the folder contains no data files ({', '.join(SUFFIXES)}, also with .gz)")
    return files


class BuiltinRows:
    """The built-in problems, or pairs of answers to them."""

    def __init__(
        self,
        source: SourceConfig,
        seed: int,
    ) -> None:
        if source.split not in BUILTIN_SIZES:
            raise UserError(f"{source.dataset}: there is no split `{source.split}`; it has train and heldout")
        if source.config_name is not None:
            raise UserError(f"{source.dataset}: it has no configurations; leave `config_name` out")
        self.name = source.dataset
        count = source.max_samples or BUILTIN_SIZES[source.split]
        self._rows: list[dict[str, str]]
        if self.name == "builtin:arithmetic-preferences":
            self._rows = problems.preferences(count, seed, source.split)
        else:
            self._rows = list(
                problems.rows(
                    count,
                    seed,
                    heldout=source.split == "heldout",
                )
            )

    def count_rows(self) -> int:
        return len(self._rows)

    def rows(self, mask: RowMask) -> NumberedRows:
        return select_rows(enumerate(self._rows, start=1), mask)

    def content_key(self) -> str:
        return hashlib.blake2b(repr(self._rows).encode()).hexdigest()
