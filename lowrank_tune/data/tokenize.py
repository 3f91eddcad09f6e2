"""Sources -> conversations -> token store, a few thousand rows at a time, found again by content."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from lowrank_tune.batch import Row
from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data.boxed import box_final_answer
from lowrank_tune.data.chat_template import ChatTemplate
from lowrank_tune.data.encode_pairs import encode_pairs
from lowrank_tune.data.files import RawExample
from lowrank_tune.data.formats import Conversation, InvalidRow, detect_format, to_conversation, with_system
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.sources import HEAD_ROWS, Chunk, RowLocation, SourceRows, read_source
from lowrank_tune.data.token_store import Entry, StoreWriter, TokenizedDataset, conversation_hash
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, Progress

VERSION = 6  # of the rules that turn a row into ids and of what is reported of it: raise it when they change
CHUNK = 512  # rows at a time: as Python numbers, long ones take a hundred times the room that they take on disk


def tokenize(
    sources: Sequence[SourceConfig],
    data: DataConfig,
    template: ChatTemplate,
    seed: int,
    emit: Emit,
    cache: Path | None = None,
    raise_on_invalid: bool = True,
    pairs: bool = False,
) -> TokenizedDataset:
    """The tokenized rows of these sources, or with `pairs` their preference pairs.

    Raises `UserError` where too many rows of one cannot be used, unless `raise_on_invalid` is false.
    """
    opened = [read_source(source, seed) for source in sources]
    formats = [format_of(source, rows, pairs) for source, rows in zip(sources, opened, strict=True)]
    folder = (cache or cache_folder()) / _key(sources, formats, opened, data, template, pairs)
    store = TokenizedDataset.open(folder)
    if store is None:
        with StoreWriter(folder, 2 if pairs else 1) as writer:
            files: dict[str, int] = {}
            reports = [
                _tokenize_source(number, source, formats[number], opened[number], data, template, writer, files, emit)
                for number, source in enumerate(sources)
            ]
            store = writer.finish(list(files), reports)
    for source, report in zip(sources, store.reports, strict=True):
        if raise_on_invalid:
            report.check(data.max_invalid_fraction)
        emit(LogMessage(message=f"{report.name}: {report.read} rows of the shape `{report.format}`"))
        if warning := check_enough_rows(source, report):
            emit(LogMessage(message=warning, level="warning"))
    return store


def cache_folder() -> Path:
    """Where stores are kept."""
    named = os.environ.get("LOWRANK_TUNE_CACHE")
    try:
        if named:
            return Path(named).expanduser()
        return Path.home() / ".cache" / "lowrank_tune"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache; name a folder in LOWRANK_TUNE_CACHE") from error


class NamedRows(Protocol):
    """Rows under the name of their source, as often as they are walked through."""

    @property
    def name(self) -> str: ...
    def __iter__(self) -> Iterator[tuple[RowLocation, RawExample | InvalidRow]]: ...


def format_of(source: SourceConfig, rows: NamedRows, pairs: bool | None = None) -> str:
    """The shape that the recipe names, or that of the first row that has a known one; with `pairs` told, it must be
    that or not."""
    format_name = source.format if source.format != "auto" else _detect_format(source, rows, bool(pairs))
    if pairs is False and format_name == "preference":
        raise UserError(
            f"{rows.name}: these rows are preference pairs; `algorithm: reward` and `algorithm: dpo` learn from them"
        )
    if pairs and format_name != "preference":
        raise UserError(
            f"{rows.name}: `format: {format_name}` holds no preference pairs, which `algorithm: reward` and "
            f"`algorithm: dpo` learn from; "
            "leave `format` out, or write `format: preference`"
        )
    return format_name


def _detect_format(source: SourceConfig, rows: NamedRows, pairs: bool) -> str:
    faults: list[UserError] = []
    for _, row in islice(rows, HEAD_ROWS):
        if not isinstance(row, InvalidRow):
            try:
                return detect_format(row, source.columns, pairs)
            except UserError as error:  # one row may lack a column; many are of no known shape
                faults.append(error)
    if faults:
        raise UserError(f"{rows.name}: {faults[0]}") from faults[0]
    raise UserError(
        f"{rows.name}: none of its first rows is a JSON object; expected one object a line, or an array of objects"
    )


def _key(
    sources: Sequence[SourceConfig],
    formats: Sequence[str],
    opened: Sequence[SourceRows],
    data: DataConfig,
    template: ChatTemplate,
    pairs: bool,
) -> str:
    parts = [
        [rows.content_key(), format_name, source.columns, source.ground_truth, source.final_answer]
        for source, format_name, rows in zip(sources, formats, opened, strict=True)
    ]
    rows_per_unit = 2 if pairs else 1
    described = json.dumps(
        [VERSION, template.fingerprint, data.max_length, data.truncation, data.system_prompt, rows_per_unit, parts],
        sort_keys=True,
    )
    return hashlib.blake2b(described.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _tokenize_source(
    number: int,
    source: SourceConfig,
    format_name: str,
    rows: SourceRows,
    data: DataConfig,
    template: ChatTemplate,
    writer: StoreWriter,
    files: dict[str, int],
    emit: Emit,
) -> SourceReport:
    report = SourceReport(rows.name, format_name, weight=source.weight)
    hashes = array("Q")
    label = f"tokenizing {rows.name}"
    emit(Progress(description=label, done=0, total=len(rows)))
    for chunk, total in chunks(rows, report):
        report.read += len(chunk)
        used: list[Entry] = []
        locations: list[tuple[int, int]] = []
        entries = (encode_pairs if format_name == "preference" else _encode)(
            chunk,
            source,
            format_name,
            data,
            template,
            report,
        )
        for (location, _), entry in zip(chunk, entries, strict=True):
            if isinstance(entry, InvalidRow):
                report.count_dropped(entry.reason, str(location))
                writer.drop(location, entry.reason)
                continue
            hashes.append(entry.row_hash)
            report.count_used(entry.rows, entry.ground_truth is not None)
            used.append(entry)
            locations.append((files.setdefault(location.file, len(files)), location.line))
        if used:
            writer.add(used, number, locations)
        emit(Progress(description=label, done=report.read, total=total))
    assert report.used + report.num_dropped == report.read
    if hashes:
        report.duplicates = len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.uint64)))
    else:
        report.duplicates = 0
    return report


def chunks(rows: SourceRows, report: SourceReport) -> Iterator[tuple[Chunk, int]]:
    """The rows of a source in chunks, each with how many will have been read in all; then others in place of those that
    could not be used."""
    read = 0
    for part in rows.refill_dropped(lambda: report.used):
        read += len(part)
        walk = iter(part)
        while chunk := list(islice(walk, CHUNK)):
            yield chunk, read


def check_enough_rows(source: SourceConfig, report: SourceReport) -> str | None:
    """Why there are fewer rows than the recipe asks for."""
    if source.max_samples is None or report.used >= source.max_samples:
        return None
    return (
        f"{report.name}: the recipe asks for {source.max_samples:,} rows, and {report.used:,} of the {report.read:,} "
        f"that there are can be used"
    )


def _encode(
    chunk: Chunk,
    source: SourceConfig,
    format_name: str,
    data: DataConfig,
    template: ChatTemplate,
    report: SourceReport,
) -> Iterator[Entry | InvalidRow]:
    """Every row of a chunk, in order: encoded, or why not."""
    chats = [
        raw if isinstance(raw, InvalidRow) else conversation(raw, source, format_name, data.system_prompt)
        for _, raw in chunk
    ]
    encoded = iter(template.encode_many([chat.messages for chat in chats if isinstance(chat, Conversation)]))
    for (location, _), chat in zip(chunk, chats, strict=True):
        if isinstance(chat, InvalidRow):
            yield chat
            continue
        row = next(encoded)
        report.longest = max(report.longest, len(row.input_ids) if isinstance(row, Row) else 0)
        if isinstance(row, Row) and len(row.input_ids) > data.max_length:
            row = _truncate(chat, data, template)
            if isinstance(row, Row):
                report.count_truncated(str(location))
        if isinstance(row, Row) and not any(row.completion_mask):
            row = InvalidRow("nothing in it is trained")
        yield (
            row
            if isinstance(row, InvalidRow)
            else Entry((row,), (conversation_hash(chat.messages),), chat.ground_truth)
        )


def conversation(
    raw: RawExample,
    source: SourceConfig,
    format_name: str,
    system: str | None,
    require_answer: bool = True,
) -> Conversation | InvalidRow:
    """The conversation of a row with the recipe's system prompt where it brings none, or what is wrong with it."""
    try:
        chat = to_conversation(raw, format_name, source.columns, source.ground_truth, require_answer=require_answer)
    except InvalidRow as fault:
        return fault
    chat = box_final_answer(chat) if source.final_answer == "boxed" else chat
    return Conversation(with_system(chat.messages, system), chat.ground_truth)


def _truncate(chat: Conversation, data: DataConfig, template: ChatTemplate) -> Row | InvalidRow:
    """The conversation up to the last answer with which it fits. No answer is ever cut: half of one teaches to stop
    there, or not to."""
    ends = [index + 1 for index, message in enumerate(chat.messages) if message.role == "assistant"]
    if data.truncation == "truncate":
        for end in reversed(ends[:-1]):
            row = template.encode_many([chat.messages[:end]])[0]
            if isinstance(row, InvalidRow) or len(row.input_ids) <= data.max_length:
                return row
        return InvalidRow(f"longer than data.max_length ({data.max_length} tokens), its first answer included")
    return InvalidRow(f"longer than data.max_length ({data.max_length} tokens)")
