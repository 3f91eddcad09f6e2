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

from lowrank_tune.data.files import SUFFIXES, Part, Picked, Raw, open_file, pick
from lowrank_tune.data.formats import RowFault
from lowrank_tune.data.hub import HubRows
from lowrank_tune.errors import UserError, did_you_mean
from lowrank_tune.settings import Source
from lowrank_tune.tutor import problems

ROWS = 4  # a tag beside those of `mixture`, which keeps the random streams apart
TUTOR = ("tutor", "tutor-preferences")
TUTOR_ROWS = {"train": 400, "heldout": 200}


class Place(NamedTuple):
    """Where a row stands: a file (or data set) and a line (of an array, a table or a data set: the row's number), from
    1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Chunk = Sequence[tuple[Place, Raw | RowFault]]


class Rows:
    """The rows of a source, all or a draw of them, in their own order.

    A draw is the beginning of one permutation of all rows, so that it can go on where it ended: `filled`.
    """

    def __init__(self, name: str, parts: Sequence[Part], count: int | None = None, seed: int = 0) -> None:
        self.name, self._parts = name, tuple(parts)
        self._lengths = [sum(1 for _ in part.lines()) for part in self._parts]
        self._start, self._end, self._asked = 0, sum(self._lengths), count
        if not self._end:
            raise UserError(
                f"{name}: it is empty; expected JSON lines, a JSON array, CSV or Parquet with at least one row"
            )
        self._drawn: NDArray[np.int64] | None = None
        if count is not None and count < self._end:
            self._drawn, self._seed = np.random.default_rng([ROWS, seed]).permutation(self._end), seed
            self._end = count

    def __len__(self) -> int:
        return self._end - self._start

    def __iter__(self) -> Iterator[tuple[Place, Raw | RowFault]]:
        picked = None
        if self._drawn is not None:
            picked = np.zeros(len(self._drawn), dtype=np.bool_)
            picked[self._drawn[self._start : self._end]] = True
        first = 0
        for part, length in zip(self._parts, self._lengths, strict=True):
            for line, row in part.rows(None if picked is None else picked[first : first + length]):
                yield Place(part.name, line), row
            first += length

    def filled(self, used: Callable[[], int]) -> Iterator[Rows]:
        """These rows, then as many further ones of the draw as are still missing when `used` tells how many could be
        used."""
        part = self
        yield part
        while self._drawn is not None and self._asked is not None:
            missing = min(self._asked - used(), len(self._drawn) - part._end)
            if missing <= 0:
                return
            part = copy.copy(part)
            part._start, part._end = part._end, part._end + missing
            yield part

    def content_key(self) -> str:
        """Changes with the contents of the files, and with the draw."""
        drawn = "" if self._drawn is None else f" {self._asked} drawn with {self._seed}"
        return " ".join([part.name + part.content_key() for part in self._parts]) + drawn


def read(source: Source, seed: int) -> Rows:
    """The rows of a source. Raises `UserError` where there is none of that name."""
    if source.dataset in TUTOR:
        return Rows(source.dataset, [_Tutor(source, seed)])
    path = Path(source.dataset).expanduser()
    try:
        is_there = path.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{source.dataset}: {error}") from error
    if not is_there and not _looks_like_a_path(source.dataset):
        return Rows(source.dataset, [HubRows(source)], source.rows, seed)
    if not is_there:
        raise UserError(_missing(source.dataset, path))
    for name, value, usual in (("name", source.name, None), ("split", source.split, "train")):
        if value != usual:
            raise UserError(
                f"{source.dataset}: `{name}: {value}` is for data sets of the hub, and this is a local path; name "
                f"the file instead"
            )
    return Rows(
        source.dataset,
        [
            open_file(
                file, source.dataset if file == path else f"{source.dataset.rstrip('/')}/{file.relative_to(path)}"
            )
            for file in _files(path)
        ],
        source.rows,
        seed,
    )


def _looks_like_a_path(name: str) -> bool:
    """So that a file that is missing is never looked for on the hub. Ids of the hub have dots too, as in `-v1.5`, but
    no such suffix."""
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or "\\" in name
        or bool(re.search(r"\.[A-Za-z]{2,8}$", name))
    )


def _missing(name: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{name}: no such file, and no folder `{folder.name}` either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() or _is_data(entry))
    near = did_you_mean(path.name, names)
    return f"{name}: no such file" + (
        near or (f"; the folder holds {', '.join(names[:8])}" if names else "; the folder holds no data files")
    )


def _is_data(path: Path) -> bool:
    return (
        path.is_file()
        and not path.name.startswith((".", "_"))
        and path.name.lower().removesuffix(".gz").endswith(SUFFIXES)
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(entry for entry in path.rglob("*") if _is_data(entry))
    if not files:
        raise UserError(f"{path}: the folder holds no data files ({', '.join(SUFFIXES)}, also with .gz)")
    return files


class _Tutor:
    """The built-in problems, or pairs of answers to them."""

    def __init__(self, source: Source, seed: int) -> None:
        if source.split not in TUTOR_ROWS:
            raise UserError(f"{source.dataset}: there is no split `{source.split}`; it has train and heldout")
        if source.name is not None:
            raise UserError(f"{source.dataset}: it has no configurations; leave `name` out")
        self.name, count = source.dataset, source.rows or TUTOR_ROWS[source.split]
        self._rows: list[dict[str, str]] = (
            problems.preferences(count, seed, source.split)
            if self.name == "tutor-preferences"
            else list(problems.rows(count, seed, heldout=source.split == "heldout"))
        )

    def lines(self) -> Iterator[int]:
        return iter(range(1, len(self._rows) + 1))

    def rows(self, picked: Picked) -> Iterator[tuple[int, Raw | RowFault]]:
        return pick(enumerate(self._rows, start=1), picked)

    def content_key(self) -> str:
        return hashlib.blake2b(repr(self._rows).encode()).hexdigest()
