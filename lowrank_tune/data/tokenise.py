"""Sources -> conversations -> token store, a few thousand rows at a time, found again by content."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lowrank_tune import settings
from lowrank_tune.data.boxed import with_box
from lowrank_tune.data.chat import Template
from lowrank_tune.data.files import Raw
from lowrank_tune.data.formats import Conversation, RowFault, detect, to_conversation, with_system
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.sides import encode_pairs
from lowrank_tune.data.sources import Chunk, Rows, read
from lowrank_tune.data.store import Entry, StoreWriter, TokenStore, talk_key
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.types import Row

VERSION = 4  # of the rules that turn a row into ids, and of what is told of it: raise it when they change
CHUNK = 512  # rows at a time: as Python numbers, long ones take a hundred times the room that they take on disk


def tokenise(
    sources: Sequence[settings.Source],
    data: settings.Data,
    template: Template,
    seed: int,
    emit: Emit,
    cache: Path | None = None,
    judge: bool = True,
    pairs: bool = False,
) -> TokenStore:
    """The tokenised rows of these sources, or with `pairs` their preference pairs.

    Raises `UserError` where too many rows of one cannot be used, unless others `judge` that.
    """
    opened = [read(source, seed) for source in sources]
    shapes = [shape_of(source, rows, pairs) for source, rows in zip(sources, opened, strict=True)]
    folder = (cache or cache_folder()) / _key(sources, shapes, opened, data, template, pairs)
    store = TokenStore.open(folder)
    if store is None:
        with StoreWriter(folder, 2 if pairs else 1) as writer:
            files: dict[str, int] = {}
            reports = [
                _tokenise_one(number, source, shapes[number], opened[number], data, template, writer, files, emit)
                for number, source in enumerate(sources)
            ]
            store = writer.finish(list(files), reports)
    for source, report in zip(sources, store.reports, strict=True):
        if judge:
            report.check(data.max_rejected_share)
        emit(Note(message=f"{report.name}: {report.read} rows of the shape `{report.format}`"))
        if short := too_few(source, report):
            emit(Note(message=short, level="warning"))
    return store


def cache_folder() -> Path:
    """Where stores are kept."""
    named = os.environ.get("LOWRANK_TUNE_CACHE")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "lowrank_tune"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache; name a folder in LOWRANK_TUNE_CACHE") from error


def shape_of(source: settings.Source, rows: Rows, pairs: bool | None = None) -> str:
    """The shape that the recipe names, or that of the first row that has a known one; with `pairs` told, it must be
    that or not."""
    shape = source.format if source.format != "auto" else _detected(source, rows, bool(pairs))
    if pairs is False and shape == "preference":
        raise UserError(
            f"{rows.name}: these rows are preference pairs; `algorithm: reward` and `algorithm: dpo` learn from them"
        )
    if pairs and shape != "preference":
        raise UserError(
            f"{rows.name}: `format: {shape}` holds no preference pairs, which `algorithm: reward` and `algorithm: "
            f"dpo` learn from; "
            "leave `format` out, or write `format: preference`"
        )
    return shape


def _detected(source: settings.Source, rows: Rows, pairs: bool) -> str:
    faults: list[UserError] = []
    for _, row in islice(rows, 1000):
        if not isinstance(row, RowFault):
            try:
                return detect(row, source.columns, pairs)
            except UserError as error:  # one row may lack a column; many are of no known shape
                faults.append(error)
    if faults:
        raise UserError(f"{rows.name}: {faults[0]}") from faults[0]
    raise UserError(
        f"{rows.name}: none of its first rows is a JSON object; expected one object a line, or an array of objects"
    )


def _key(
    sources: Sequence[settings.Source],
    shapes: Sequence[str],
    opened: Sequence[Rows],
    data: settings.Data,
    template: Template,
    pairs: bool,
) -> str:
    parts = [
        [rows.content_key(), shape, source.columns, source.gold, source.final_answer]
        for source, shape, rows in zip(sources, shapes, opened, strict=True)
    ]
    together = 2 if pairs else 1
    described = json.dumps(
        [VERSION, template.fingerprint, data.max_length, data.too_long, data.system, together, parts], sort_keys=True
    )
    return hashlib.blake2b(described.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _tokenise_one(
    number: int,
    source: settings.Source,
    shape: str,
    rows: Rows,
    data: settings.Data,
    template: Template,
    writer: StoreWriter,
    files: dict[str, int],
    emit: Emit,
) -> SourceReport:
    report = SourceReport(rows.name, shape, weight=source.weight)
    keys = array("Q")
    what = f"tokenising {rows.name}"
    emit(Progress(what=what, done=0, total=len(rows)))
    for chunk, total in chunks(rows, report):
        report.read += len(chunk)
        kept: list[Entry] = []
        places: list[tuple[int, int]] = []
        entries = (encode_pairs if shape == "preference" else _encode)(chunk, source, shape, data, template, report)
        for (place, _), entry in zip(chunk, entries, strict=True):
            if isinstance(entry, RowFault):
                report.drop(entry.reason, str(place))
                writer.drop(place, entry.reason)
                continue
            keys.append(entry.key)
            report.use(entry.rows, entry.gold is not None)
            kept.append(entry)
            places.append((files.setdefault(place.file, len(files)), place.line))
        if kept:
            writer.add(kept, number, places)
        emit(Progress(what=what, done=report.read, total=total))
    assert report.used + report.rejected == report.read
    report.duplicates = len(keys) - len(np.unique(np.frombuffer(keys, dtype=np.uint64))) if keys else 0
    return report


def chunks(rows: Rows, report: SourceReport) -> Iterator[tuple[Chunk, int]]:
    """The rows of a source in chunks, each with how many will have been read in all; then others in place of those that
    could not be used."""
    read = 0
    for part in rows.filled(lambda: report.used):
        read += len(part)
        walk = iter(part)
        while chunk := list(islice(walk, CHUNK)):
            yield chunk, read


def too_few(source: settings.Source, report: SourceReport) -> str | None:
    """Why there are fewer rows than the recipe asks for."""
    if source.rows is None or report.used >= source.rows:
        return None
    return (
        f"{report.name}: the recipe asks for {source.rows:,} rows, and {report.used:,} of the {report.read:,} "
        f"that there are can be used"
    )


def _encode(
    chunk: Chunk, source: settings.Source, shape: str, data: settings.Data, template: Template, report: SourceReport
) -> Iterator[Entry | RowFault]:
    """Every row of a chunk, in order: encoded, or why not."""
    talks = [raw if isinstance(raw, RowFault) else conversation(raw, source, shape, data.system) for _, raw in chunk]
    encoded = iter(template.encode_many([talk.messages for talk in talks if isinstance(talk, Conversation)]))
    for (place, _), talk in zip(chunk, talks, strict=True):
        if isinstance(talk, RowFault):
            yield talk
            continue
        row = next(encoded)
        report.longest = max(report.longest, len(row.ids) if isinstance(row, Row) else 0)
        if isinstance(row, Row) and len(row.ids) > data.max_length:
            row = _shorten(talk, data, template)
            if isinstance(row, Row):
                report.truncate(str(place))
        if isinstance(row, Row) and not any(row.says):
            row = RowFault("nothing in it is trained")
        yield row if isinstance(row, RowFault) else Entry((row,), (talk_key(talk.messages),), talk.gold)


def conversation(
    raw: Raw, source: settings.Source, shape: str, system: str | None, answered: bool = True
) -> Conversation | RowFault:
    """The conversation of a row with the recipe's system prompt where it brings none, or what is wrong with it."""
    try:
        talk = to_conversation(raw, shape, source.columns, source.gold, answered=answered)
    except RowFault as fault:
        return fault
    talk = with_box(talk) if source.final_answer == "boxed" else talk
    return Conversation(with_system(talk.messages, system), talk.gold)


def _shorten(talk: Conversation, data: settings.Data, template: Template) -> Row | RowFault:
    """The conversation up to the last answer with which it fits. No answer is ever cut: half of one teaches to stop
    there, or not to."""
    ends = [index + 1 for index, message in enumerate(talk.messages) if message.role == "assistant"]
    if data.too_long == "truncate":
        for end in reversed(ends[:-1]):
            row = template.encode_many([talk.messages[:end]])[0]
            if isinstance(row, RowFault) or len(row.ids) <= data.max_length:
                return row
        return RowFault(f"longer than data.max_length ({data.max_length} tokens), its first answer included")
    return RowFault(f"longer than data.max_length ({data.max_length} tokens)")
