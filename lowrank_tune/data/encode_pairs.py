"""Preference pairs -> two rows each, the chosen one first. Only what the assistant says behind the prompt is trained,
on both sides alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank_tune.batch import Row
from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data.chat_template import ChatTemplate
from lowrank_tune.data.files import RawExample
from lowrank_tune.data.formats import InvalidRow, with_system
from lowrank_tune.data.preference_pairs import EQUAL_ANSWERS, Messages, PreferencePair, to_pair
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.sources import Chunk
from lowrank_tune.data.token_store import Entry, conversation_hash
from lowrank_tune.errors import UserError

RowPair = tuple[Row, Row]
PROMPT_MISMATCH = "the ids of its prompt are not the beginning of both sides"


def encode_pairs(
    chunk: Chunk,
    source: SourceConfig,
    format_name: str,
    data_config: DataConfig,
    template: ChatTemplate,
    report: SourceReport,
) -> Iterator[Entry | InvalidRow]:
    """Every row of a chunk, in order: encoded, or why not. `format_name` is always that of pairs."""
    pairs = [
        raw if isinstance(raw, InvalidRow) else pair_of(raw, source, data_config.system_prompt) for _, raw in chunk
    ]
    encoded = iter(_encode([pair for pair in pairs if isinstance(pair, PreferencePair)], template))
    for (location, _), pair in zip(chunk, pairs, strict=True):
        if isinstance(pair, InvalidRow):
            yield pair
            continue
        prompt, rows = next(encoded)
        if not isinstance(rows, InvalidRow):
            report.longest = max(report.longest, _max_length(rows))
            if _max_length(rows) > data_config.max_length:
                rows = _truncate(pair, len(prompt), data_config, template)
                if not isinstance(rows, InvalidRow):
                    report.count_truncated(str(location))
        yield rows if isinstance(rows, InvalidRow) else _entry(pair, rows)


def pair_of(raw: RawExample, source: SourceConfig, system: str | None) -> PreferencePair | InvalidRow:
    """The pair of a row with the recipe's system prompt where it brings none, or what is wrong with it."""
    try:
        pair = to_pair(raw, source.columns)
    except InvalidRow as fault:
        return fault
    return PreferencePair(with_system(pair.prompt, system), pair.chosen, pair.rejected, pair.margin)


def _encode(pairs: Sequence[PreferencePair], template: ChatTemplate) -> list[tuple[list[int], RowPair | InvalidRow]]:
    """For each pair the ids of its prompt, and both rows; through one call of the tokenizer for all sides."""
    encoded = template.encode_many(
        [(*pair.prompt, *answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    )
    out: list[tuple[list[int], RowPair | InvalidRow]] = []
    for number, pair in enumerate(pairs):
        chosen, rejected = encoded[2 * number : 2 * number + 2]
        if isinstance(chosen, InvalidRow):
            out.append(([], chosen))
        elif isinstance(rejected, InvalidRow):
            out.append(([], rejected))
        else:
            out.append(_encode_completions(pair.prompt, chosen, rejected, template))
    return out


def _encode_completions(
    messages: Messages,
    chosen: Row,
    rejected: Row,
    template: ChatTemplate,
) -> tuple[list[int], RowPair | InvalidRow]:
    try:
        prompt = template.prompt(messages)
    except UserError as error:
        return [], InvalidRow(str(error))
    return prompt, _mask_prompt(prompt, chosen, rejected)


def _mask_prompt(prompt: list[int], chosen: Row, rejected: Row) -> RowPair | InvalidRow:
    """Both rows with nothing of the prompt trained."""
    length = len(prompt)
    if not all(list(row.input_ids[:length]) == prompt for row in (chosen, rejected)):
        return InvalidRow(PROMPT_MISMATCH)
    if list(chosen.input_ids) == list(rejected.input_ids):
        return InvalidRow(EQUAL_ANSWERS)  # the template drops what they differ in, as spaces at the end
    if not all(any(row.completion_mask[length:]) for row in (chosen, rejected)):
        return InvalidRow("nothing in it is trained")
    first, second = (
        Row(row.input_ids, [*(False for _ in prompt), *row.completion_mask[length:]]) for row in (chosen, rejected)
    )
    return first, second


def _truncate(pair: PreferencePair, prompt: int, data: DataConfig, template: ChatTemplate) -> RowPair | InvalidRow:
    """The pair without the oldest exchanges of its prompt, as few as it takes. No answer is ever cut, and the last
    question stays."""
    reason = f"longer than data.max_length ({data.max_length} tokens)"
    if data.truncation == "truncate":
        shorter = _drop_oldest_turns(pair.prompt)
    else:
        shorter = iter(())
    for messages in shorter:
        ((ids, rows),) = _encode([PreferencePair(messages, pair.chosen, pair.rejected)], template)
        if isinstance(rows, InvalidRow) or _max_length(rows) <= data.max_length:
            return rows
        prompt = len(ids)
    return InvalidRow(
        f"{reason}, its {'last question' if data.truncation == 'truncate' else 'prompt'} alone"
        if prompt > data.max_length
        else reason
    )


def _drop_oldest_turns(prompt: Messages) -> Iterator[Messages]:
    """The prompt without its first question and answer, without the first two, and so on down to the last question."""
    if prompt[0].role == "system":
        system, turns = (prompt[:1], prompt[1:])
    else:
        system, turns = ((), prompt)
    return ((*system, *turns[start:]) for start in range(2, len(turns), 2))


def _max_length(rows: RowPair) -> int:
    return max(len(row.input_ids) for row in rows)


def _entry(pair: PreferencePair, rows: RowPair) -> Entry:
    return Entry(
        rows,
        (conversation_hash((*pair.prompt, *pair.chosen)), conversation_hash((*pair.prompt, *pair.rejected))),
        margin=pair.margin,
    )
