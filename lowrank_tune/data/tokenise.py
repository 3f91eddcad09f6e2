"""Sources -> conversations -> token store, a few thousand rows at a time, found again by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from lowrank_tune import settings
from lowrank_tune.data.chat import Template
from lowrank_tune.data.files import Raw
from lowrank_tune.data.formats import Conversation, RowFault, detect, to_conversation
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.sources import Place, Rows, read
from lowrank_tune.data.store import StoreWriter, TokenStore
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.types import Message, Row

VERSION = 2  # of the rules that turn a row into ids, and of what is told of it: raise it when they change
CHUNK = 2048


def tokenise(sources: Sequence[settings.Source], data: settings.Data, template: Template, seed: int, emit: Emit,
             cache: Path | None = None, judge: bool = True) -> TokenStore:  # fmt: skip
    """The tokenised rows of these sources. Raises `UserError` where too many rows of one cannot be used, unless others `judge` that."""
    opened = [read(source, seed) for source in sources]
    shapes = [shape_of(source, rows) for source, rows in zip(sources, opened, strict=True)]
    folder = (cache or cache_folder()) / _key(sources, shapes, opened, data, template)
    store = TokenStore.open(folder)
    if store is None:
        with StoreWriter(folder) as writer:
            files: dict[str, int] = {}
            reports = [_tokenise_one(number, source, shapes[number], opened[number], data, template, writer, files, emit)
                       for number, source in enumerate(sources)]  # fmt: skip
            store = writer.finish(list(files), reports)
    for report in store.reports:
        if judge:
            report.check(data.max_rejected_share)
        emit(Note(message=f"{report.name}: {report.read} rows of the shape `{report.format}`"))
    return store


def cache_folder() -> Path:
    """Where stores are kept."""
    named = os.environ.get("LOWRANK_TUNE_CACHE")
    try:
        return Path(named).expanduser() if named else Path.home() / ".cache" / "lowrank_tune"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache; name a folder in LOWRANK_TUNE_CACHE") from error


def shape_of(source: settings.Source, rows: Rows) -> str:
    """The shape that the recipe names, or that of the first row that is well formed."""
    if source.format != "auto":
        return source.format
    for _, row in islice(rows, 1000):
        if not isinstance(row, RowFault):
            try:
                return detect(row, source.columns)
            except UserError as error:
                raise UserError(f"{rows.name}: {error}") from error
    raise UserError(f"{rows.name}: none of its first rows is a JSON object; expected one object a line, or an array of objects")


def _key(sources: Sequence[settings.Source], shapes: Sequence[str], opened: Sequence[Rows], data: settings.Data, template: Template) -> str:
    parts = [[rows.content_key(), shape, source.columns, source.gold] for source, shape, rows in zip(sources, shapes, opened, strict=True)]
    described = json.dumps([VERSION, template.fingerprint, data.max_length, data.too_long, data.system, parts], sort_keys=True)
    return hashlib.blake2b(described.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _tokenise_one(number: int, source: settings.Source, shape: str, rows: Rows, data: settings.Data, template: Template, writer: StoreWriter,
                  files: dict[str, int], emit: Emit) -> SourceReport:  # fmt: skip
    report = SourceReport(rows.name, shape, weight=source.weight)
    seen: set[int] = set()
    what = f"tokenising {rows.name}"
    emit(Progress(what=what, done=0, total=len(rows)))
    walk = iter(rows)
    while chunk := list(islice(walk, CHUNK)):
        report.read += len(chunk)
        kept: list[tuple[Row, Conversation, int]] = []
        places: list[tuple[int, int]] = []
        for place, talk, row in _encode(chunk, source, shape, data, template, report):
            if isinstance(row, RowFault) or talk is None:
                reason = row.reason if isinstance(row, RowFault) else "not an object with columns"
                report.drop(reason, str(place))
                writer.drop(place, reason)
                continue
            key = _talk_key(talk)
            report.duplicates += key in seen
            seen.add(key)
            report.used += 1
            report.golds += talk.gold is not None
            report.tokens += len(row.ids)
            report.trained_tokens += sum(row.says)
            kept.append((row, talk, key))
            places.append((files.setdefault(place.file, len(files)), place.line))
        if kept:
            writer.add(kept, number, places)
        emit(Progress(what=what, done=report.read, total=len(rows)))
    assert report.used + report.rejected == report.read
    return report


def _encode(chunk: Sequence[tuple[Place, Raw | RowFault]], source: settings.Source, shape: str, data: settings.Data, template: Template,
            report: SourceReport) -> Iterator[tuple[Place, Conversation | None, Row | RowFault]]:  # fmt: skip
    """Every row of a chunk, in order: encoded, or why not."""
    talks: list[Conversation | RowFault] = []
    for _, raw in chunk:
        talks.append(raw if isinstance(raw, RowFault) else conversation(raw, source, shape, data.system))
    encoded = iter(template.encode_many([talk.messages for talk in talks if isinstance(talk, Conversation)]))
    for (place, _), talk in zip(chunk, talks, strict=True):
        if isinstance(talk, RowFault):
            yield place, None, talk
            continue
        row = next(encoded)
        report.longest = max(report.longest, len(row.ids) if isinstance(row, Row) else 0)
        if isinstance(row, Row) and len(row.ids) > data.max_length:
            row = _shorten(talk, data, template)
            if isinstance(row, Row):
                report.truncate(str(place))
        if isinstance(row, Row) and not any(row.says):
            row = RowFault("nothing in it is trained")
        yield place, talk, row


def conversation(raw: Raw, source: settings.Source, shape: str, system: str | None, answered: bool = True) -> Conversation | RowFault:
    """The conversation of a row with the recipe's system prompt where it brings none, or what is wrong with it."""
    try:
        talk = to_conversation(raw, shape, source.columns, source.gold, answered=answered)
    except RowFault as fault:
        return fault
    if system and talk.messages[0].role != "system":
        return Conversation((Message("system", system), *talk.messages), talk.gold)
    return talk


def _shorten(talk: Conversation, data: settings.Data, template: Template) -> Row | RowFault:
    """The conversation up to the last answer with which it fits. No answer is ever cut: half of one teaches to stop there, or not to."""
    ends = [index + 1 for index, message in enumerate(talk.messages) if message.role == "assistant"]
    if data.too_long == "truncate":
        for end in reversed(ends[:-1]):
            row = template.encode_many([talk.messages[:end]])[0]
            if isinstance(row, RowFault) or len(row.ids) <= data.max_length:
                return row
        return RowFault(f"longer than data.max_length ({data.max_length} tokens), its first answer included")
    return RowFault(f"longer than data.max_length ({data.max_length} tokens)")


def _talk_key(talk: Conversation) -> int:
    """Equal for equal conversations."""
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in talk.messages)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
