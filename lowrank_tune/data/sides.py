"""Preference pairs -> two rows each, the chosen one first. Only what the assistant says behind the prompt is trained,
on both sides alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank_tune import settings
from lowrank_tune.data.chat import Template
from lowrank_tune.data.files import Raw
from lowrank_tune.data.formats import RowFault, with_system
from lowrank_tune.data.pairs import EQUAL, Pair, Talk, to_pair
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.sources import Chunk
from lowrank_tune.data.store import Entry, talk_key
from lowrank_tune.errors import UserError
from lowrank_tune.types import Row

Rows = tuple[Row, Row]
PROMPT_CHANGES = "the ids of its prompt are not the beginning of both sides"


def encode_pairs(
    chunk: Chunk, source: settings.Source, shape: str, data: settings.Data, template: Template, report: SourceReport
) -> Iterator[Entry | RowFault]:
    """Every row of a chunk, in order: encoded, or why not. `shape` is always that of pairs."""
    pairs = [raw if isinstance(raw, RowFault) else pair_of(raw, source, data.system) for _, raw in chunk]
    encoded = iter(_encode([pair for pair in pairs if isinstance(pair, Pair)], template))
    for (place, _), pair in zip(chunk, pairs, strict=True):
        if isinstance(pair, RowFault):
            yield pair
            continue
        prompt, rows = next(encoded)
        if not isinstance(rows, RowFault):
            report.longest = max(report.longest, _longest(rows))
            if _longest(rows) > data.max_length:
                rows = _shorten(pair, len(prompt), data, template)
                if not isinstance(rows, RowFault):
                    report.truncate(str(place))
        yield rows if isinstance(rows, RowFault) else _entry(pair, rows)


def pair_of(raw: Raw, source: settings.Source, system: str | None) -> Pair | RowFault:
    """The pair of a row with the recipe's system prompt where it brings none, or what is wrong with it."""
    try:
        pair = to_pair(raw, source.columns)
    except RowFault as fault:
        return fault
    return Pair(with_system(pair.prompt, system), pair.chosen, pair.rejected, pair.margin)


def _encode(pairs: Sequence[Pair], template: Template) -> list[tuple[list[int], Rows | RowFault]]:
    """For each pair the ids of its prompt, and both rows; through one call of the tokenizer for all sides."""
    encoded = template.encode_many(
        [(*pair.prompt, *answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    )
    out: list[tuple[list[int], Rows | RowFault]] = []
    for number, pair in enumerate(pairs):
        chosen, rejected = encoded[2 * number : 2 * number + 2]
        if isinstance(chosen, RowFault):
            out.append(([], chosen))
        elif isinstance(rejected, RowFault):
            out.append(([], rejected))
        else:
            out.append(_behind_prompt(pair.prompt, chosen, rejected, template))
    return out


def _behind_prompt(messages: Talk, chosen: Row, rejected: Row, template: Template) -> tuple[list[int], Rows | RowFault]:
    try:
        prompt = template.prompt(messages)
    except UserError as error:
        return [], RowFault(str(error))
    return prompt, _checked(prompt, chosen, rejected)


def _checked(prompt: list[int], chosen: Row, rejected: Row) -> Rows | RowFault:
    """Both rows with nothing of the prompt trained."""
    length = len(prompt)
    if not all(list(row.ids[:length]) == prompt for row in (chosen, rejected)):
        return RowFault(PROMPT_CHANGES)
    if list(chosen.ids) == list(rejected.ids):
        return RowFault(EQUAL)  # the template drops what they differ in, as spaces at the end
    if not all(any(row.says[length:]) for row in (chosen, rejected)):
        return RowFault("nothing in it is trained")
    first, second = (Row(row.ids, [*(False for _ in prompt), *row.says[length:]]) for row in (chosen, rejected))
    return first, second


def _shorten(pair: Pair, prompt: int, data: settings.Data, template: Template) -> Rows | RowFault:
    """The pair without the oldest exchanges of its prompt, as few as it takes. No answer is ever cut, and the last
    question stays."""
    told = f"longer than data.max_length ({data.max_length} tokens)"
    shorter = _without_oldest(pair.prompt) if data.too_long == "truncate" else iter(())
    for talk in shorter:
        ((ids, rows),) = _encode([Pair(talk, pair.chosen, pair.rejected)], template)
        if isinstance(rows, RowFault) or _longest(rows) <= data.max_length:
            return rows
        prompt = len(ids)
    return RowFault(
        f"{told}, its {'last question' if data.too_long == 'truncate' else 'prompt'} alone"
        if prompt > data.max_length
        else told
    )


def _without_oldest(prompt: Talk) -> Iterator[Talk]:
    """The prompt without its first question and answer, without the first two, and so on down to the last question."""
    system, turns = (prompt[:1], prompt[1:]) if prompt[0].role == "system" else ((), prompt)
    return ((*system, *turns[start:]) for start in range(2, len(turns), 2))


def _longest(rows: Rows) -> int:
    return max(len(row.ids) for row in rows)


def _entry(pair: Pair, rows: Rows) -> Entry:
    return Entry(
        rows, (talk_key((*pair.prompt, *pair.chosen)), talk_key((*pair.prompt, *pair.rejected))), margin=pair.margin
    )
