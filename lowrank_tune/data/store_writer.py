"""Writes a store of tokenized rows: flat arrays, the dropped rows and `store.json`, in one folder.

Nothing is synced to the disk: a cache can be made again, and its checksums detect one that a crash left incomplete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from lowrank_tune.batch import Row
from lowrank_tune.data.array_files import ArrayFile, checksum
from lowrank_tune.data.message import Message
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.token_store import ARRAYS, NO_LABEL, TokenizedDataset
from lowrank_tune.errors import TrainingError
from lowrank_tune.full_disk import CACHE_CURE, describe_full_disk, full_disk_reason


@dataclass(frozen=True)
class Entry:
    """A tokenized row of a source, a unit of the store: one row; two of a pair, the chosen and the rejected one; or
    several of one conversation, the longest first, or of one document. `conversation_hashes`: the hash of the
    conversation of each. `has_tools`: tools are defined or called."""

    rows: tuple[Row, ...]
    conversation_hashes: tuple[int, ...]
    ground_truth: str | None = None
    margin: float = 0.0
    has_reasoning: bool = False
    has_tools: bool = False
    is_pair: bool = False
    label: bool | None = None
    """Whether the answer is desirable; None for a row without a label."""
    split_hash: int | None = None
    """Equal for entries that the split into training and validation keeps together. Default: `row_hash`."""

    @property
    def row_hash(self) -> int:
        """Equal for equal entries. That of a conversation or a document does not depend on the number of its rows, so
        that it is in the same part of the split with every template and length."""
        if not self.is_pair:
            return self.conversation_hashes[0]
        return _hash(np.array(self.conversation_hashes, dtype="<u8").tobytes())


def conversation_hash(messages: Sequence[Message], tools: str = "") -> int:
    """Returns a number that is equal for equal conversations with equal tools. That of a conversation without reasoning
    and tools depends on roles and contents alone, so that it stays in its part of the split."""
    texts = []
    for message in messages:
        plain = Message(message.role, message.content)
        parts = (message.content,) if message == plain else message.texts()
        texts.append("\x1f".join((message.role, *parts)))
    if tools:
        texts.append(tools)
    return _hash("\x1e".join(texts).encode())


def document_hash(text: str, piece: int) -> int:
    """Returns a number that is equal for equal pieces of equal texts."""
    return _hash(f"{piece}\x1f{text}".encode())


def _split_hash(entry: Entry) -> int:
    return entry.row_hash if entry.split_hash is None else entry.split_hash


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class StoreWriter:
    """Writes a store in a temporary folder beside its own, and renames it at the end. Without `finish` nothing is
    left."""

    def __init__(
        self,
        folder: Path,
        rows_per_unit: int = 1,
    ) -> None:
        """`rows_per_unit`: 2 for pairs, 1 for units of any number of rows."""
        self.folder = folder
        self.rows_per_unit = rows_per_unit
        self._num_tokens = 0
        self._num_rows = 0

    def __enter__(self) -> Self:
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(
                tempfile.mkdtemp(
                    prefix=f"{self.folder.name}.",
                    suffix=".tmp",
                    dir=parent,
                )
            )
            self._open_arrays()
        except OSError as error:
            if hasattr(self, "_temporary"):
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise _write_error(parent, error) from error
        return self

    def _open_arrays(self) -> None:
        self._arrays = {name: ArrayFile(self._temporary / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        self._dropped = (self._temporary / "dropped.jsonl").open("w", encoding="utf-8")
        self._arrays["starts"].append([0])
        self._arrays["unit_starts"].append([0])

    def __exit__(
        self,
        _: object,
        error: BaseException | None,
        __: object,
    ) -> None:
        files: list[IO[Any]] = [array.file for array in self._arrays.values()]
        files.append(self._dropped)
        for file in files:
            # Closing writes what is buffered, and that may be what does not fit on the disk.
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise _write_error(self.folder.parent, error) from error

    def add(
        self,
        entries: Sequence[Entry],
        source: int,
        locations: Sequence[tuple[int, int]],
    ) -> None:
        """Appends entries of a source, with the number of the file and the line of each."""
        counts = np.array([len(entry.rows) for entry in entries], dtype=np.int64)
        assert self.rows_per_unit == 1 or bool((counts == self.rows_per_unit).all()), "a pair has two rows"
        assert bool(counts.all()), "an entry without rows"
        self._add_tokens([row for entry in entries for row in entry.rows])
        self._arrays["unit_starts"].append(self._num_rows + np.cumsum(counts))
        self._num_rows += int(counts.sum())
        conversation_hashes = chain.from_iterable(entry.conversation_hashes for entry in entries)
        self._arrays["conversation_hashes"].append(np.array([*conversation_hashes], dtype=np.uint64))
        per_entry: dict[str, Any] = {
            "sources": [source] * len(entries),
            "files": [file for file, _ in locations],
            "lines": [line for _, line in locations],
            "row_hashes": np.array([entry.row_hash for entry in entries], dtype=np.uint64),
            "margins": [entry.margin for entry in entries],
            "labels": [NO_LABEL if entry.label is None else int(entry.label) for entry in entries],
            "split_hashes": np.array([_split_hash(entry) for entry in entries], dtype=np.uint64),
        }
        for name, values in per_entry.items():
            self._arrays[name].append(np.repeat(values, counts))

    def _add_tokens(self, rows: Sequence[Row]) -> None:
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        num_tokens = int(lengths.sum())
        input_ids = chain.from_iterable(row.input_ids for row in rows)
        completion_mask = chain.from_iterable(row.completion_mask for row in rows)
        self._arrays["input_ids"].append(np.fromiter(input_ids, np.int32, num_tokens))
        self._arrays["completion_mask"].append(np.fromiter(completion_mask, np.bool_, num_tokens))
        self._arrays["starts"].append(self._num_tokens + np.cumsum(lengths))
        self._num_tokens += num_tokens

    def drop(
        self,
        location: tuple[str, int],
        reason: str,
    ) -> None:
        """Records a row that is not used."""
        file, line = location
        self._dropped.write(json.dumps({"file": file, "line": line, "reason": reason}) + "\n")

    def finish(
        self,
        files: list[str],
        reports: list[SourceReport],
    ) -> TokenizedDataset:
        """Completes the store and moves it to its folder. Returns it."""
        for array in self._arrays.values():
            array.close()
        self._dropped.close()
        state = {
            "rows_per_unit": self.rows_per_unit,
            "files": files,
            "reports": [asdict(report) for report in reports],
            "sums": {path.name: checksum(path) for path in sorted(self._temporary.iterdir())},
        }
        (self._temporary / "store.json").write_text(json.dumps(state), encoding="utf-8")
        if self.folder.exists() and TokenizedDataset.open(self.folder) is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self._temporary.rename(self.folder)
        except OSError:
            # Another process may have written the same store in the meantime.
            if TokenizedDataset.open(self.folder) is None:
                raise
        store = TokenizedDataset.open(self.folder)
        assert store is not None
        return store


def _write_error(folder: Path, error: OSError) -> TrainingError:
    fault = f"{folder}: the cache of tokenized rows cannot be written"
    reason = full_disk_reason(error)
    if reason:
        return TrainingError(f"{fault}: {describe_full_disk(folder / 'rows', reason, CACHE_CURE)}")
    return TrainingError(
        f"{fault} ({error.strerror or error}); free some space, or name another folder in LOWRANK_TUNE_CACHE"
    )
