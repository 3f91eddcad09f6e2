"""From the rows of a source to tokenized ones: a conversation becomes one row, a preference pair two, the chosen one
first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.batch import Row
from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data.formats import (
    Conversation,
    InvalidRow,
    RawRowOrFault,
    RowOrFault,
    box_final_answer,
    to_conversation,
    with_system,
)
from lowrank_tune.data.preference_pairs import (
    EQUAL_ANSWERS,
    Messages,
    PreferencePair,
    to_pair,
)
from lowrank_tune.data.report import ANSWER_INCLUDED, SourceReport
from lowrank_tune.data.sources import Chunk, RowLocation
from lowrank_tune.data.store_writer import Entry, conversation_hash
from lowrank_tune.data.templates.chat_template import ChatTemplate
from lowrank_tune.data.templates.spans import NOTHING_TRAINED

RowPair = tuple[Row, Row]
PROMPT_MISMATCH = "the ids of its prompt are not the beginning of both sides"


@dataclass(frozen=True)
class SourceContext:
    """What the rows of a source are encoded with. `report` counts the longest row and those that are truncated."""

    source: SourceConfig
    data: DataConfig
    template: ChatTemplate
    report: SourceReport


def encode_chunk(chunk: Chunk, context: SourceContext) -> Iterator[Entry | InvalidRow]:
    """Yields for every row of a chunk, in order, the tokenized row or its fault."""
    items = [_read_row(raw, context) for _, raw in chunk]
    conversations = [item.messages for item in items if isinstance(item, Conversation)]
    pairs = [item for item in items if isinstance(item, PreferencePair)]
    encoded_rows = iter(context.template.encode_many(conversations))
    encoded_pairs = iter(_encode_pairs(pairs, context.template))
    for (location, _), item in zip(chunk, items, strict=True):
        if isinstance(item, Conversation):
            yield _conversation_entry(
                item,
                next(encoded_rows),
                location,
                context,
            )
        elif isinstance(item, PreferencePair):
            yield _pair_entry(
                item,
                next(encoded_pairs),
                location,
                context,
            )
        else:
            yield item


def _read_row(raw: RawRowOrFault, context: SourceContext) -> Conversation | PreferencePair | InvalidRow:
    system = context.data.system_prompt
    try:
        if context.report.format == "preference":
            return pair_of(raw, context.source, system)
        return conversation_of(
            raw,
            context.source,
            context.report.format,
            system,
        )
    except InvalidRow as fault:
        return fault


def conversation_of(
    raw: RawRowOrFault,
    source: SourceConfig,
    format_name: str,
    system: str | None,
    require_answer: bool = True,
) -> Conversation:
    """Returns the conversation of a row, with the recipe's system prompt if it has none. Raises InvalidRow."""
    if isinstance(raw, InvalidRow):
        raise raw
    conversation = to_conversation(
        raw,
        format_name,
        source.columns,
        source.ground_truth,
        require_answer=require_answer,
    )
    if source.final_answer == "boxed":
        conversation = box_final_answer(conversation)
    return replace(conversation, messages=with_system(conversation.messages, system))


def pair_of(
    raw: RawRowOrFault,
    source: SourceConfig,
    system: str | None,
) -> PreferencePair:
    """Returns the pair of a row, with the recipe's system prompt if it has none. Raises InvalidRow."""
    if isinstance(raw, InvalidRow):
        raise raw
    pair = to_pair(raw, source.columns)
    return replace(pair, prompt=with_system(pair.prompt, system))


def _conversation_entry(
    conversation: Conversation,
    row: RowOrFault,
    location: RowLocation,
    context: SourceContext,
) -> Entry | InvalidRow:
    if isinstance(row, InvalidRow):
        return row
    report = context.report
    length = len(row.input_ids)
    report.longest = max(report.longest, length)
    if length > context.data.max_length:
        row = _truncate_conversation(conversation, context)
        if isinstance(row, InvalidRow):
            return row
    if not any(row.completion_mask):
        return InvalidRow(NOTHING_TRAINED)
    if length > context.data.max_length:
        report.count_truncated(str(location))
    return Entry(
        (row,),
        (conversation_hash(conversation.messages),),
        conversation.ground_truth,
    )


def _truncate_conversation(conversation: Conversation, context: SourceContext) -> RowOrFault:
    """Returns the conversation up to the last answer with which it fits.

    No answer is ever truncated: half of one would train to stop at that place, or not to stop. The beginning stays, as
    the turns after it refer to it. So a row is invalid if its first question, or this with its answer, is too long.
    """
    data = context.data
    if data.truncation != "truncate":
        return InvalidRow(too_long(data))
    messages = conversation.messages
    ends = [index + 1 for index, message in enumerate(messages) if message.role == "assistant"]
    for end in reversed(ends[:-1]):
        (row,) = context.template.encode_many([messages[:end]])
        if isinstance(row, InvalidRow) or len(row.input_ids) <= data.max_length:
            return row
    if _prompt_length(messages[: ends[0] - 1], context.template) > data.max_length:
        return InvalidRow(f"{too_long(data)}, its first question alone")
    return InvalidRow(f"{too_long(data)}, its first {ANSWER_INCLUDED}")


def _prompt_length(messages: Messages, template: ChatTemplate) -> int:
    """Returns the length of a prompt in tokens, 0 if the template cannot render it without its answer."""
    (ids,) = template.prompt_many([messages])
    return 0 if isinstance(ids, InvalidRow) else len(ids)


def too_long(data: DataConfig) -> str:
    """Returns the reason for a row that is too long."""
    return f"longer than data.max_length ({data.max_length} tokens)"


@dataclass(frozen=True)
class _EncodedPair:
    """Both rows of a pair, or their fault, and the length of the prompt in tokens."""

    rows: RowPair | InvalidRow
    prompt_length: int = 0

    @property
    def max_length(self) -> int:
        """The length of the longer row."""
        if isinstance(self.rows, InvalidRow):
            return 0
        return max(len(row.input_ids) for row in self.rows)


def _pair_entry(
    pair: PreferencePair,
    encoded: _EncodedPair,
    location: RowLocation,
    context: SourceContext,
) -> Entry | InvalidRow:
    rows = encoded.rows
    context.report.longest = max(context.report.longest, encoded.max_length)
    if encoded.max_length > context.data.max_length:
        rows = _truncate_pair(pair, encoded.prompt_length, context)
        if not isinstance(rows, InvalidRow):
            context.report.count_truncated(str(location))
    if isinstance(rows, InvalidRow):
        return rows
    hashes = (
        conversation_hash((*pair.prompt, *pair.chosen)),
        conversation_hash((*pair.prompt, *pair.rejected)),
    )
    return Entry(rows, hashes, margin=pair.margin)


def _encode_pairs(pairs: Sequence[PreferencePair], template: ChatTemplate) -> list[_EncodedPair]:
    """Encodes pairs, through one call of the tokenizer for all sides."""
    conversations: list[Messages] = []
    for pair in pairs:
        conversations += [(*pair.prompt, *pair.chosen), (*pair.prompt, *pair.rejected)]
    rows = template.encode_many(conversations)
    sides = list(zip(rows[::2], rows[1::2], strict=True))
    usable = [
        pair.prompt
        for pair, both in zip(pairs, sides, strict=True)
        if not any(isinstance(row, InvalidRow) for row in both)
    ]
    prompts = iter(template.prompt_many(usable))
    encoded = []
    for chosen, rejected in sides:
        if isinstance(chosen, InvalidRow):
            encoded.append(_EncodedPair(chosen))
        elif isinstance(rejected, InvalidRow):
            encoded.append(_EncodedPair(rejected))
        else:
            encoded.append(_encode_completions(next(prompts), chosen, rejected))
    return encoded


def _encode_completions(
    prompt: list[int] | InvalidRow,
    chosen: Row,
    rejected: Row,
) -> _EncodedPair:
    if isinstance(prompt, InvalidRow):
        return _EncodedPair(prompt)
    return _EncodedPair(_mask_prompt(prompt, chosen, rejected), len(prompt))


def _mask_prompt(
    prompt: list[int],
    chosen: Row,
    rejected: Row,
) -> RowPair | InvalidRow:
    """Returns both rows with only the completions trained, on both sides alike."""
    length = len(prompt)
    if any(list(row.input_ids[:length]) != prompt for row in (chosen, rejected)):
        return InvalidRow(PROMPT_MISMATCH)
    # The template may drop what they differ in, such as spaces at the end.
    if list(chosen.input_ids) == list(rejected.input_ids):
        return InvalidRow(EQUAL_ANSWERS)
    if not (any(chosen.completion_mask[length:]) and any(rejected.completion_mask[length:])):
        return InvalidRow(NOTHING_TRAINED)
    untrained = [False] * length
    return (
        Row(chosen.input_ids, [*untrained, *chosen.completion_mask[length:]]),
        Row(rejected.input_ids, [*untrained, *rejected.completion_mask[length:]]),
    )


def _truncate_pair(
    pair: PreferencePair,
    prompt_length: int,
    context: SourceContext,
) -> RowPair | InvalidRow:
    """Returns the pair without the oldest exchanges of its prompt, as few as possible. No answer is ever truncated, and
    the last question stays."""
    data = context.data
    part = "prompt"
    if data.truncation == "truncate":
        part = "last question"
        for prompt in shorter_prompts(pair.prompt):
            (encoded,) = _encode_pairs([replace(pair, prompt=prompt)], context.template)
            if encoded.max_length <= data.max_length:
                return encoded.rows
            prompt_length = encoded.prompt_length
    reason = too_long(data)
    if prompt_length > data.max_length:
        reason += f", its {part} alone"
    elif data.truncation == "truncate":
        reason += f", its last question and an {ANSWER_INCLUDED}"
    return InvalidRow(reason)


def shorter_prompts(prompt: Messages) -> Iterator[Messages]:
    """Yields the prompt without its first question and answer, without the first two, and so on down to the last
    question."""
    system = prompt[:1] if prompt[0].role == "system" else ()
    turns = prompt[len(system) :]
    for start in range(2, len(turns), 2):
        yield (*system, *turns[start:])
