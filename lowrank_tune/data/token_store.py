"""Tokenized rows on disk, memory-mapped: flat arrays and where each row starts. A store is a folder that is complete or
absent.

Nothing is synced to the disk: a cache can be made again, and the checksums find one that a crash left broken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, Self, cast

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.batch import Row
from lowrank_tune.data.message import Message
from lowrank_tune.data.report import SourceReport
from lowrank_tune.errors import ConfigProblem, TrainingError

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
    "ground_truths": "|u1",
    "ground_truth_starts": "<i8",
    "has_ground_truth": "|b1",
}
SLICE = 8192  # rows hashed at a time: a store may be larger than memory
ROWS_PER_PAGE_RELEASE = 1024  # rows read, after which their pages are given back
MAX_CHECKSUM_BYTES = (
    1 << 30
)  # bytes; reading more than this at every start would cost longer than a broken cache is likely


@dataclass(frozen=True)
class Entry:
    """What a row of a source becomes: one row, or two, the chosen and the rejected one. `conversation_hashes`: a number
    for the conversation of each."""

    rows: tuple[Row, ...]
    conversation_hashes: tuple[int, ...]
    ground_truth: str | None = None
    margin: float = 0.0

    @property
    def row_hash(self) -> int:
        """Equal for equal entries."""
        if len(self.conversation_hashes) == 1:
            return self.conversation_hashes[0]
        return int.from_bytes(
            hashlib.blake2b(np.array(self.conversation_hashes, dtype="<u8").tobytes(), digest_size=8).digest(), "little"
        )


def conversation_hash(messages: Sequence[Message]) -> int:
    """Equal for equal conversations."""
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in messages)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class ArrayFile:
    """A `.npy` file that grows: numpy leaves room in the header for the length."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.file: BinaryIO = path.open("wb")
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._write_npy_header()
        self._start = self.file.tell()

    def _write_npy_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: Any) -> None:
        """Writes more values."""
        array = np.asarray(values, dtype=self.dtype)
        self.count += array.size
        self.file.write(array.tobytes())

    def close(self) -> None:
        """Writes the length."""
        self.file.seek(0)
        self._write_npy_header()
        assert self.file.tell() == self._start, "numpy no longer leaves room in the header"
        self.file.close()


class StoreWriter:
    """Writes a store in a temporary folder beside its place, and renames it at the end. Leaves nothing behind
    otherwise."""

    def __init__(self, folder: Path, rows_per_unit: int = 1) -> None:
        self.folder = folder
        self.rows_per_unit = rows_per_unit
        self._tokens = self._ground_truth_bytes = 0

    def __enter__(self) -> Self:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(
                tempfile.mkdtemp(prefix=f"{self.folder.name}.", suffix=".tmp", dir=self.folder.parent)
            )
            self._open_arrays()
        except OSError as error:
            if hasattr(self, "_temporary"):
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise _write_error(self.folder.parent, error) from error
        return self

    def _open_arrays(self) -> None:
        self._arrays = {name: ArrayFile(self._temporary / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        self._dropped = (self._temporary / "dropped.jsonl").open("w", encoding="utf-8")
        self._arrays["starts"].append([0])
        self._arrays["ground_truth_starts"].append([0])

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        files: list[IO[Any]] = [*(array.file for array in self._arrays.values()), self._dropped]
        for file in files:
            with contextlib.suppress(OSError):  # what is still to be flushed may be what does not fit
                file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise _write_error(self.folder.parent, error) from error

    def add(self, entries: Sequence[Entry], source: int, file_lines: Sequence[tuple[int, int]]) -> None:
        """Appends entries, with the file and the line of each."""
        array = self._arrays
        rows = [row for entry in entries for row in entry.rows]
        of_row = [number for number, entry in enumerate(entries) for _ in entry.rows]
        assert len(rows) == self.rows_per_unit * len(entries)
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        ground_truths = [(entries[number].ground_truth or "").encode() for number in of_row]
        values: dict[str, Any] = {
            "input_ids": np.fromiter(chain.from_iterable(row.input_ids for row in rows), np.int32, int(lengths.sum())),
            "completion_mask": np.fromiter(
                chain.from_iterable(row.completion_mask for row in rows),
                np.bool_,
                int(lengths.sum()),
            ),
            "starts": self._tokens + np.cumsum(lengths),
            "sources": [source] * len(rows),
            "files": [file_lines[number][0] for number in of_row],
            "lines": [file_lines[number][1] for number in of_row],
            "row_hashes": np.array([entries[number].row_hash for number in of_row], dtype=np.uint64),
            "conversation_hashes": np.array(
                [chat_hash for entry in entries for chat_hash in entry.conversation_hashes], dtype=np.uint64
            ),
            "margins": [entries[number].margin for number in of_row],
            "ground_truths": np.frombuffer(b"".join(ground_truths), dtype=np.uint8),
            "has_ground_truth": [entries[number].ground_truth is not None for number in of_row],
            "ground_truth_starts": self._ground_truth_bytes
            + np.cumsum([len(encoded) for encoded in ground_truths], dtype=np.int64),
        }
        for name, value in values.items():
            array[name].append(value)
        self._tokens += int(lengths.sum())
        self._ground_truth_bytes += sum(map(len, ground_truths))

    def drop(self, location: tuple[str, int], reason: str) -> None:
        """Writes down a row that is not used."""
        self._dropped.write(json.dumps({"file": location[0], "line": location[1], "reason": reason}) + "\n")

    def finish(self, files: list[str], reports: list[SourceReport]) -> TokenizedDataset:
        """Completes the store and puts it in its place."""
        for file in self._arrays.values():
            file.close()
        self._dropped.close()
        sums = {path.name: _checksum(path) for path in sorted(self._temporary.iterdir())}
        state = {
            "rows_per_unit": self.rows_per_unit,
            "files": files,
            "reports": [asdict(report) for report in reports],
            "sums": sums,
        }
        (self._temporary / "store.json").write_text(json.dumps(state), encoding="utf-8")
        if self.folder.exists() and TokenizedDataset.open(self.folder) is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self._temporary.rename(self.folder)
        except OSError:
            if TokenizedDataset.open(self.folder) is None:  # else another process was quicker, with the same rows
                raise
        store = TokenizedDataset.open(self.folder)
        assert store is not None
        return store


class TokenizedDataset:
    """Tokenized rows. `[i]` is a `Row` of numpy views; `select_rows` gives a store of some of the rows.

    A unit is what is learned from at once: a row; or, with `rows_per_unit` 2, the two adjacent rows of a pair, the
    chosen one first.
    """

    def __init__(
        self,
        arrays: dict[str, NDArray[Any]],
        files: list[str],
        reports: list[SourceReport],
        folder: Path,
        indices: NDArray[np.int64],
        rows_per_unit: int = 1,
    ) -> None:
        self._arrays = arrays
        self.files = files
        self.reports = reports
        self.folder = folder
        self.indices = indices
        self.rows_per_unit = rows_per_unit
        starts = arrays["starts"]
        self.lengths: NDArray[np.int64] = np.asarray(starts[indices + 1] - starts[indices])
        self.source_of: NDArray[np.int32] = np.asarray(arrays["sources"][indices])
        self.units = len(indices) // rows_per_unit
        self.unit_lengths: NDArray[np.int64] = (
            self.lengths if rows_per_unit == 1 else self.lengths.reshape(-1, rows_per_unit).sum(axis=1)
        )
        """Tokens of all rows of each unit."""
        self.unit_source_of: NDArray[np.int32] = self.source_of[::rows_per_unit]
        self._rows_read = 0

    # What follows is asked for now and then: it is read where it is asked for, and not kept.

    @property
    def line_of(self) -> NDArray[np.int64]:
        """The line that each row comes from."""
        return np.asarray(self._arrays["lines"][self.indices])

    @property
    def row_hashes(self) -> NDArray[np.uint64]:
        """Equal for equal conversations; of pairs for equal pairs, on both rows."""
        return np.asarray(self._arrays["row_hashes"][self.indices])

    @property
    def unit_hashes(self) -> NDArray[np.uint64]:
        """The same, one a unit."""
        return self.row_hashes[:: self.rows_per_unit]

    @property
    def conversation_hashes(self) -> NDArray[np.uint64]:
        """Of each row alone: equal for equal conversations."""
        return np.asarray(self._arrays["conversation_hashes"][self.indices])

    @cached_property
    def margins(self) -> NDArray[np.float32]:
        """By how much the chosen one should be ahead, on both rows of a pair; 0 where nothing says so."""
        return np.asarray(self._arrays["margins"][self.indices])

    @classmethod
    def open(cls, folder: Path) -> TokenizedDataset | None:
        """The store in this folder; None where there is none, or a broken one."""
        try:
            state = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            for name, (size, checksum) in state["sums"].items():
                if _checksum(folder / name) != [size, checksum]:
                    return None
            arrays = {
                name: np.load(
                    folder / f"{name}.npy",
                    mmap_mode="r" if _is_filled(folder / f"{name}.npy") else None,
                    allow_pickle=False,
                )
                for name in ARRAYS
            }
            reports = [SourceReport.from_dict(report) for report in state["reports"]]
            return cls(
                arrays,
                state["files"],
                reports,
                folder,
                np.arange(len(arrays["starts"]) - 1),
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
        # Arrays behave as the sequences that a `Row` holds.
        return Row(
            cast(Sequence[int], self._arrays["input_ids"][start:end]),
            cast(Sequence[bool], self._arrays["completion_mask"][start:end]),
        )

    def select_rows(self, rows: NDArray[np.int64]) -> TokenizedDataset:
        """A store of these rows, on the same arrays; of pairs both rows, one after the other."""
        firsts = rows[:: self.rows_per_unit]
        assert all(
            np.array_equal(rows[offset :: self.rows_per_unit], firsts + offset) for offset in range(self.rows_per_unit)
        ), "half of a pair"
        assert not (firsts % self.rows_per_unit).any(), "rows of two pairs"
        return TokenizedDataset(
            self._arrays,
            self.files,
            self.reports,
            self.folder,
            self.indices[rows],
            self.rows_per_unit,
        )

    def select_units(self, units: NDArray[np.int64]) -> TokenizedDataset:
        """The same by numbers of units."""
        return self.select_rows(self.rows_of(units))

    def rows_of(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of these units, one unit after the other."""
        return np.asarray((units[:, None] * self.rows_per_unit + np.arange(self.rows_per_unit)).reshape(-1))

    def content_hash(self) -> str:
        """Changes with any id, mask or length of these rows, and with their numbers in the whole store."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), SLICE):
            for array in (*self.concat_rows(start, start + SLICE), self.indices[start : start + SLICE]):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def concat_rows(self, start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
        """Ids and mask of the rows from `start` to before `end`, one after the other, and the length of each."""
        lengths = self.lengths[start:end]
        firsts = self._arrays["starts"][self.indices[start:end]]
        behind = np.cumsum(lengths)
        positions = np.repeat(firsts - (behind - lengths), lengths) + np.arange(behind[-1] if len(behind) else 0)
        input_ids = np.asarray(self._arrays["input_ids"][positions])
        completion_mask = np.asarray(self._arrays["completion_mask"][positions])
        self._release_pages()
        return input_ids, completion_mask, lengths

    def _release_pages(self) -> None:
        """Tells the kernel that what was read of the large files need not stay in this process: it would count as its
        memory."""
        for name in ("input_ids", "completion_mask"):
            mapped = self._arrays[name].base
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def ground_truth_of(self, index: int) -> str | None:
        """The gold answer of a row."""
        row = self.indices[index]
        if not self._arrays["has_ground_truth"][row]:
            return None
        start = self._arrays["ground_truth_starts"][row]
        end = self._arrays["ground_truth_starts"][row + 1]
        return bytes(self._arrays["ground_truths"][start:end]).decode()

    def row_location(self, index: int) -> str:
        """Where the row came from: `file:line`."""
        row = self.indices[index]
        return f"{self.files[int(self._arrays['files'][row])]}:{int(self._arrays['lines'][row])}"

    def num_trained_tokens(self, index: int) -> int:
        """How many tokens of the row are trained."""
        return int(np.count_nonzero(self[index].completion_mask))

    def dropped(self) -> Iterator[ConfigProblem]:
        """Every row that was read and not used, with its reason."""
        with (self.folder / "dropped.jsonl").open(encoding="utf-8") as file:
            for line in file:
                fault = json.loads(line)
                yield ConfigProblem(fault["reason"], file=fault["file"], line=fault["line"])


def _is_filled(path: Path) -> bool:
    """An array without entries cannot be mapped: its file ends with the header."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, _ = ((1,), False, None)
    return bool(shape[0])


def _checksum(path: Path) -> list[int]:
    size = path.stat().st_size
    checksum = 0
    if size <= MAX_CHECKSUM_BYTES:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
    return [size, checksum]


def _write_error(folder: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{folder}: the cache of tokenized rows cannot be written ({error.strerror or error}); "
        "free some space, or name another folder in LOWRANK_TUNE_CACHE"
    )
