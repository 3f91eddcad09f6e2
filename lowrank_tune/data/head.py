"""The first rows of a source: enough to see what it holds, without reading or counting the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from lowrank_tune.config import SourceConfig
from lowrank_tune.data.array_head import open_array_head
from lowrank_tune.data.files import DataFile, RawExample
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.sources import (
    BUILTIN_DATASETS,
    HEAD_ROWS,
    BuiltinRows,
    RowLocation,
    empty_source,
    open_local_files,
)


class SourceHead:
    """The first rows of files, read anew at each walk and only as far as the walk goes."""

    def __init__(self, name: str, files: Sequence[DataFile]) -> None:
        self.name = name
        self._files = tuple(files)

    def __iter__(self) -> Iterator[tuple[RowLocation, RawExample | InvalidRow]]:
        return islice(chain.from_iterable(map(_located_rows, self._files)), HEAD_ROWS)


def _located_rows(file: DataFile) -> Iterator[tuple[RowLocation, RawExample | InvalidRow]]:
    return ((RowLocation(file.name, line), row) for line, row in file.rows(None))


def read_head(source: SourceConfig, seed: int) -> SourceHead:
    """The first rows of a source that is no data set of the hub. Raises `UserError` where it is not there, cannot be
    read, or is empty."""
    if source.dataset in BUILTIN_DATASETS:
        few = source.model_copy(update={"max_samples": source.max_samples and min(source.max_samples, HEAD_ROWS)})
        return SourceHead(source.dataset, [BuiltinRows(few, seed)])
    head = SourceHead(source.dataset, open_local_files(source, open_array_head))
    if next(iter(head), None) is None:
        raise empty_source(source.dataset)
    return head
