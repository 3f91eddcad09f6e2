"""A store of tokenized rows on disk, memory-mapped: flat arrays, and where each row starts in them.

A store is a folder that is complete or absent; `store_writer.py` writes it.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.batch import Row
from lowrank_tune.data.array_files import checksum, load_array
from lowrank_tune.data.report import SourceReport
from lowrank_tune.json_files import read_json

AnyArray = NDArray[Any]
IntArray = NDArray[np.int64]
HashArray = NDArray[np.uint64]

ARRAYS: dict[str, str] = {
    "input_ids": "<i4",
    "completion_mask": "|b1",
    "starts": "<i8",
    "sources": "<i4",
    "files": "<i4",
    "lines": "<i8",
    "row_hashes": "<u8",
    "conversation_hashes": "<u8",
    "margins": "<f4",
    "unit_starts": "<i8",
    "labels": "|i1",
    "split_hashes": "<u8",
}
"""The arrays of a store and their dtypes. `input_ids` and `completion_mask` have one entry a token, `starts` has one a
row and the end, `unit_starts` one a unit and the end; the others have one entry a row."""
NO_LABEL = -1
"""Label of a row without one; a desirable answer has 1, an undesirable one 0."""
TOKEN_ARRAYS = ("input_ids", "completion_mask")
SLICE = 8192
"""Rows that are hashed at a time: a store may be larger than memory."""
ROWS_PER_PAGE_RELEASE = 1024
"""Rows that are read until their pages are released."""


class TokenizedDataset:
    """Tokenized rows. `[i]` is a `Row` of numpy views; `select_units` returns a store of some of the units.

    A unit is what a step draws at once: adjacent rows, from `unit_starts[i]` to before `unit_starts[i + 1]`. With
    `rows_per_unit` 2 it is a pair, the chosen row first, and its rows are computed together. With `rows_per_unit` 1 it
    has any number of rows, and each of them may be computed alone: those of a conversation, the longest first, or the
    documents of a pack.
    """

    def __init__(
        self,
        arrays: dict[str, AnyArray],
        files: list[str],
        reports: list[SourceReport],
        folder: Path,
        indices: IntArray,
        rows_per_unit: int = 1,
        unit_starts: IntArray | None = None,
    ) -> None:
        self._arrays = arrays
        self.files = files
        self.reports = reports
        self.folder = folder
        self.indices = indices
        self.rows_per_unit = rows_per_unit
        if unit_starts is None:
            unit_starts = np.arange(0, len(indices) + 1, rows_per_unit)
        self.unit_starts = unit_starts
        starts = arrays["starts"]
        self.lengths: IntArray = np.asarray(starts[indices + 1] - starts[indices])
        self.source_of: NDArray[np.int32] = np.asarray(arrays["sources"][indices])
        self.units = len(unit_starts) - 1
        self.unit_lengths: IntArray = self.sum_units(self.lengths)
        """Tokens of all rows of each unit."""
        self.unit_source_of: NDArray[np.int32] = self.source_of[unit_starts[:-1]]
        self._rows_read = 0

    @property
    def padded_unit_lengths(self) -> list[int]:
        """Tokens of each unit with its rows padded to one length."""
        if not self.units:
            return []
        longest = np.maximum.reduceat(self.lengths, self.unit_starts[:-1])
        return [int(length) for length in longest * np.diff(self.unit_starts)]

    def sum_units(self, values: IntArray) -> IntArray:
        """Returns the sum of a value of the rows for each unit."""
        if not self.units:
            return np.zeros(0, dtype=np.int64)
        return np.asarray(np.add.reduceat(values, self.unit_starts[:-1]))

    @cached_property
    def families(self) -> IntArray:
        """(rows,) equal for rows that may share their beginning: the unit of a row, or for a document a number of its
        own."""
        families = np.repeat(np.arange(self.units), np.diff(self.unit_starts))
        is_document = self.is_document
        families[is_document] = self.units + np.flatnonzero(is_document)
        return families

    @property
    def is_document(self) -> NDArray[np.bool_]:
        """(rows,) whether a row is plain text."""
        sources = [number for number, report in enumerate(self.reports) if report.format == "text"]
        return np.isin(self.source_of, sources)

    # These are used rarely: they are read when they are used, and not kept.

    @property
    def row_hashes(self) -> HashArray:
        """Equal for equal rows of the data: conversations, pairs or documents. All rows made of one have its hash."""
        return np.asarray(self._arrays["row_hashes"][self.indices])

    @property
    def unit_hashes(self) -> HashArray:
        """Those of the first row of each unit."""
        return self.row_hashes[self.unit_starts[:-1]]

    @property
    def conversation_hashes(self) -> HashArray:
        """Of each row alone: equal for equal conversations."""
        return np.asarray(self._arrays["conversation_hashes"][self.indices])

    @property
    def unit_split_hashes(self) -> HashArray:
        """Equal for units that the split into training and validation keeps together."""
        return np.asarray(self._arrays["split_hashes"][self.indices[self.unit_starts[:-1]]])

    @cached_property
    def labels(self) -> NDArray[np.int8]:
        """Of each row: 1 for a desirable answer, 0 for an undesirable one, `NO_LABEL` for a row without a label."""
        return np.asarray(self._arrays["labels"][self.indices])

    @property
    def is_labeled(self) -> bool:
        """Whether the rows have labels."""
        return bool((self.labels != NO_LABEL).any())

    @cached_property
    def margins(self) -> NDArray[np.float32]:
        """By how much the chosen answer should be ahead, on both rows of a pair; 0 without a margin."""
        return np.asarray(self._arrays["margins"][self.indices])

    @classmethod
    def open(cls, folder: Path) -> TokenizedDataset | None:
        """Returns the store in this folder; None if it is missing or damaged."""
        try:
            state = read_json(folder / "store.json")
            for name, (size, crc) in state["sums"].items():
                if checksum(folder / name) != [size, crc]:
                    return None
            arrays = {name: load_array(folder / f"{name}.npy") for name in ARRAYS}
            reports = [SourceReport.from_dict(report) for report in state["reports"]]
            num_rows = len(arrays["starts"]) - 1
            return cls(
                arrays,
                state["files"],
                reports,
                folder,
                np.arange(num_rows),
                state["rows_per_unit"],
                np.asarray(arrays["unit_starts"]),
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Row:
        row = self.indices[index]
        start = self._arrays["starts"][row]
        end = self._arrays["starts"][row + 1]
        self._rows_read += 1
        if self._rows_read % ROWS_PER_PAGE_RELEASE == 0:
            self._release_pages()
        # The arrays behave as the sequences of a `Row`.
        return Row(
            cast(Sequence[int], self._arrays["input_ids"][start:end]),
            cast(Sequence[bool], self._arrays["completion_mask"][start:end]),
        )

    def select_rows(self, rows: IntArray) -> TokenizedDataset:
        """Returns a store of these rows, on the same arrays; all rows of each unit, one after the other."""
        units = self.units_of(rows)
        units = units[self.unit_starts[units] == rows]
        assert np.array_equal(rows, self.rows_of(units)), "the rows are not those of whole units, such as pairs"
        return self.select_units(units)

    def select_units(self, units: IntArray) -> TokenizedDataset:
        """Returns a store of these units, on the same arrays."""
        counts = self.unit_starts[units + 1] - self.unit_starts[units]
        return self.regroup(self.rows_of(units), _starts_of(counts))

    def regroup(self, rows: IntArray, unit_starts: IntArray) -> TokenizedDataset:
        """Returns a store of these rows, on the same arrays, with other units."""
        return TokenizedDataset(
            self._arrays,
            self.files,
            self.reports,
            self.folder,
            self.indices[rows],
            self.rows_per_unit,
            unit_starts,
        )

    def rows_of(self, units: IntArray) -> IntArray:
        """Returns the rows of these units, one unit after the other."""
        first_rows = self.unit_starts[units]
        counts = self.unit_starts[units + 1] - first_rows
        ends = np.cumsum(counts)
        return np.asarray(np.arange(counts.sum()) + np.repeat(first_rows - ends + counts, counts))

    def units_of(self, rows: IntArray) -> IntArray:
        """Returns the unit of each of these rows."""
        return np.asarray(np.searchsorted(self.unit_starts, rows, side="right") - 1)

    def content_hash(self) -> str:
        """Returns a hash that changes with any id, mask or length of these rows, and with their numbers in the whole
        store."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), SLICE):
            end = start + SLICE
            for array in (*self.concat_rows(start, end), self.indices[start:end]):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def concat_rows(
        self,
        start: int,
        end: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_], IntArray]:
        """Returns ids and mask of the rows from `start` to before `end`, concatenated, and the length of each row."""
        lengths = self.lengths[start:end]
        # The rows may be anywhere in the arrays. The position of a token there is its position in the result, shifted
        # by as much as the start of its row.
        store_starts = self._arrays["starts"][self.indices[start:end]]
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) + np.repeat(store_starts - starts, lengths)
        input_ids = np.asarray(self._arrays["input_ids"][positions])
        completion_mask = np.asarray(self._arrays["completion_mask"][positions])
        self._release_pages()
        return input_ids, completion_mask, lengths

    def _release_pages(self) -> None:
        """Releases the pages of the large files that were read: they would count as memory of this process."""
        for name in TOKEN_ARRAYS:
            mapped = self._arrays[name].base
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def row_location(self, index: int) -> str:
        """Returns where the row came from: `file:line`."""
        row = self.indices[index]
        file = self.files[int(self._arrays["files"][row])]
        return f"{file}:{int(self._arrays['lines'][row])}"

    def num_trained_tokens(self, index: int) -> int:
        """Returns how many tokens of the row are trained."""
        return int(np.count_nonzero(self[index].completion_mask))


def _starts_of(counts: IntArray) -> IntArray:
    """Returns the start of each unit and the end of the last one, from the numbers of their rows."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
