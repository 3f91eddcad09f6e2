"""A store of tokenized rows on disk, memory-mapped: flat arrays, and where each row starts in them.

A store is a folder that is complete or absent; `store_writer.py` writes it.
"""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.batch import Row
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
    "labels": "|i1",
    "split_hashes": "<u8",
}
"""The arrays of a store and their dtypes. `input_ids` and `completion_mask` have one entry a token, `starts` has one a
row and the end; the others have one entry a row."""
NO_LABEL = -1
"""Label of a row without one; a desirable answer has 1, an undesirable one 0."""
TOKEN_ARRAYS = ("input_ids", "completion_mask")
SLICE = 8192
"""Rows that are hashed at a time: a store may be larger than memory."""
ROWS_PER_PAGE_RELEASE = 1024
"""Rows that are read until their pages are released."""
MAX_CHECKSUM_BYTES = 1 << 30
"""Of larger files only the size is checked: to read them at every start would take too long."""
CHECKSUM_BLOCK_BYTES = 1 << 20


class TokenizedDataset:
    """Tokenized rows. `[i]` is a `Row` of numpy views; `select_rows` returns a store of some of the rows.

    A unit is what is learned from at once: a row; or, with `rows_per_unit` 2, the two adjacent rows of a pair, the
    chosen one first.
    """

    def __init__(
        self,
        arrays: dict[str, AnyArray],
        files: list[str],
        reports: list[SourceReport],
        folder: Path,
        indices: IntArray,
        rows_per_unit: int = 1,
    ) -> None:
        self._arrays = arrays
        self.files = files
        self.reports = reports
        self.folder = folder
        self.indices = indices
        self.rows_per_unit = rows_per_unit
        starts = arrays["starts"]
        self.lengths: IntArray = np.asarray(starts[indices + 1] - starts[indices])
        self.source_of: NDArray[np.int32] = np.asarray(arrays["sources"][indices])
        self.units = len(indices) // rows_per_unit
        self.unit_lengths: IntArray = self.lengths
        """Tokens of all rows of each unit."""
        if rows_per_unit > 1:
            self.unit_lengths = self.lengths.reshape(-1, rows_per_unit).sum(axis=1)
        self.unit_source_of: NDArray[np.int32] = self.source_of[::rows_per_unit]
        self._rows_read = 0

    @property
    def padded_unit_lengths(self) -> list[int]:
        """Tokens of each unit with its rows padded to one length."""
        longest = self.lengths.reshape(-1, self.rows_per_unit).max(axis=1)
        return [int(length) for length in longest * self.rows_per_unit]

    # These are used rarely: they are read when they are used, and not kept.

    @property
    def row_hashes(self) -> HashArray:
        """Equal for equal conversations; of pairs for equal pairs, on both rows."""
        return np.asarray(self._arrays["row_hashes"][self.indices])

    @property
    def unit_hashes(self) -> HashArray:
        """The same, one a unit."""
        return self.row_hashes[:: self.rows_per_unit]

    @property
    def conversation_hashes(self) -> HashArray:
        """Of each row alone: equal for equal conversations."""
        return np.asarray(self._arrays["conversation_hashes"][self.indices])

    @property
    def unit_split_hashes(self) -> HashArray:
        """Equal for units that the split into training and validation keeps together."""
        return np.asarray(self._arrays["split_hashes"][self.indices])[:: self.rows_per_unit]

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
            arrays = {name: _load_array(folder / f"{name}.npy") for name in ARRAYS}
            reports = [SourceReport.from_dict(report) for report in state["reports"]]
            num_rows = len(arrays["starts"]) - 1
            return cls(
                arrays,
                state["files"],
                reports,
                folder,
                np.arange(num_rows),
                state["rows_per_unit"],
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
        """Returns a store of these rows, on the same arrays; of pairs both rows, one after the other."""
        units = rows[:: self.rows_per_unit] // self.rows_per_unit
        assert np.array_equal(rows, self.rows_of(units)), "the rows are not those of whole pairs"
        return TokenizedDataset(
            self._arrays,
            self.files,
            self.reports,
            self.folder,
            self.indices[rows],
            self.rows_per_unit,
        )

    def select_units(self, units: IntArray) -> TokenizedDataset:
        """Returns a store of these units."""
        return self.select_rows(self.rows_of(units))

    def rows_of(self, units: IntArray) -> IntArray:
        """Returns the rows of these units, one unit after the other."""
        first_rows = units[:, None] * self.rows_per_unit
        return np.asarray((first_rows + np.arange(self.rows_per_unit)).reshape(-1))

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


def _load_array(path: Path) -> AnyArray:
    """Maps an array. One without entries cannot be mapped, because its file ends with the header, and is read."""
    mode: Any = "r" if _has_entries(path) else None
    array = np.load(path, mmap_mode=mode, allow_pickle=False)
    return cast(AnyArray, array)


def _has_entries(path: Path) -> bool:
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            return True
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return bool(shape[0])


def checksum(path: Path) -> list[int]:
    """Returns the size of a file in bytes and the CRC-32 of its contents (0 for a file above `MAX_CHECKSUM_BYTES`)."""
    size = path.stat().st_size
    crc = 0
    if size <= MAX_CHECKSUM_BYTES:
        with path.open("rb") as file:
            while block := file.read(CHECKSUM_BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
    return [size, crc]
