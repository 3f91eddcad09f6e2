"""From the rows of a source to tokenized ones: a conversation becomes one row, or several where its template rewrites
turns; a preference pair becomes two, the chosen one first; a document (`text_rows.py`) as many as its length needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.batch import Row
from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data.formats import (
    Conversation,
    InvalidRow,
    RawRowOrFault,
    box_final_answer,
    to_conversation,
    with_system,
)
from lowrank_tune.data.message import has_reasoning, has_tools
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
from lowrank_tune.data.text_rows import encode_documents

RowPair = tuple[Row, Row]
REWRITTEN_ANSWER = "an answer of a side that the base's chat template rewrites once the next turn follows"
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
    if context.report.format == "text":
        yield from encode_documents(
            [raw for _, raw in chunk],
            context.source.columns,
            context.data.max_length,
            context.template,
            context.report,
        )
        return
    items = [_read_row(raw, context) for _, raw in chunk]
    conversations = [item for item in items if isinstance(item, Conversation)]
    pairs = [item for item in items if isinstance(item, PreferencePair)]
    encoded_rows = iter(_encode_conversations(conversations, context.template))
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
    pair = to_pair(
        raw,
        source.columns,
        source.score_margin_scale,
    )
    return replace(pair, prompt=with_system(pair.prompt, system))


def _encode_conversations(
    conversations: Sequence[Conversation],
    template: ChatTemplate,
) -> list[tuple[Row, ...] | InvalidRow]:
    return template.encode_all(
        [conversation.messages for conversation in conversations],
        [conversation.tools for conversation in conversations],
    )


def _conversation_entry(
    conversation: Conversation,
    rows: tuple[Row, ...] | InvalidRow,
    location: RowLocation,
    context: SourceContext,
) -> Entry | InvalidRow:
    if isinstance(rows, InvalidRow):
        return rows
    report = context.report
    length = _longest(rows)
    report.longest = max(report.longest, length)
    if length > context.data.max_length:
        truncated = _truncate_conversation(conversation, context)
        if isinstance(truncated, InvalidRow):
            return truncated
        rows = truncated
    if not all(any(row.completion_mask) for row in rows):
        return InvalidRow(NOTHING_TRAINED)
    if length > context.data.max_length:
        report.count_truncated(str(location))
    row_hash = conversation_hash(conversation.messages, conversation.tools)
    return Entry(
        rows,
        (row_hash,) * len(rows),
        conversation.ground_truth,
        has_reasoning=has_reasoning(conversation.messages),
        has_tools=has_tools(conversation.messages, conversation.tools),
    )


def _longest(rows: Sequence[Row]) -> int:
    return max(len(row.input_ids) for row in rows)


def _truncate_conversation(conversation: Conversation, context: SourceContext) -> tuple[Row, ...] | InvalidRow:
    """Returns the rows of the conversation up to the last answer with which it fits.

    No answer is ever truncated: half of one would train to stop at that place, or not to stop. The beginning stays, as
    the turns after it refer to it. So a row is invalid if its first question, or this with its answer, is too long.
    """
    data = context.data
    if data.truncation != "truncate":
        return InvalidRow(too_long(data))
    messages = conversation.messages
    ends = [index + 1 for index, message in enumerate(messages) if message.role == "assistant"]
    for end in reversed(ends[:-1]):
        shorter = replace(conversation, messages=messages[:end])
        (rows,) = _encode_conversations([shorter], context.template)
        if isinstance(rows, InvalidRow) or _longest(rows) <= data.max_length:
            return rows
    prompt = replace(conversation, messages=messages[: ends[0] - 1])
    if _prompt_length(prompt, context.template) > data.max_length:
        return InvalidRow(f"{too_long(data)}, its first question alone")
    return InvalidRow(f"{too_long(data)}, its first {ANSWER_INCLUDED}")


def _prompt_length(prompt: Conversation, template: ChatTemplate) -> int:
    """Returns the length of a prompt in tokens, 0 if the template cannot render it without its answer."""
    (ids,) = template.prompt_many([prompt.messages], [prompt.tools])
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
        conversation_hash((*pair.prompt, *pair.chosen), pair.tools),
        conversation_hash((*pair.prompt, *pair.rejected), pair.tools),
    )
    messages = (*pair.prompt, *pair.chosen, *pair.rejected)
    return Entry(
        rows,
        hashes,
        margin=pair.margin,
        is_pair=True,
        has_reasoning=has_reasoning(messages),
        has_tools=has_tools(messages, pair.tools),
    )


def _encode_pairs(pairs: Sequence[PreferencePair], template: ChatTemplate) -> list[_EncodedPair]:
    """Encodes pairs, through one call of the tokenizer for all sides."""
    conversations: list[Messages] = []
    tools: list[str] = []
    for pair in pairs:
        conversations += [(*pair.prompt, *pair.chosen), (*pair.prompt, *pair.rejected)]
        tools += [pair.tools, pair.tools]
    rows = template.encode_many(conversations, tools)
    sides = list(zip(rows[::2], rows[1::2], strict=True))
    usable = [
        pair for pair, both in zip(pairs, sides, strict=True) if not any(isinstance(row, InvalidRow) for row in both)
    ]
    prompts = iter(template.prompt_many([pair.prompt for pair in usable], [pair.tools for pair in usable]))
    encoded = []
    for pair, (chosen, rejected) in zip(pairs, sides, strict=True):
        if isinstance(chosen, InvalidRow):
            encoded.append(_EncodedPair(chosen))
        elif isinstance(rejected, InvalidRow):
            encoded.append(_EncodedPair(rejected))
        else:
            encoded.append(
                _encode_completions(
                    pair,
                    next(prompts),
                    chosen,
                    rejected,
                )
            )
    return encoded


def _encode_completions(
    pair: PreferencePair,
    prompt: list[int] | InvalidRow,
    chosen: Row,
    rejected: Row,
) -> _EncodedPair:
    if isinstance(prompt, InvalidRow):
        return _EncodedPair(prompt)
    rows = _mask_prompt(prompt, chosen, rejected)
    counts = (num_answers(pair.chosen), num_answers(pair.rejected))
    if isinstance(rows, InvalidRow):
        if rows.reason == PROMPT_MISMATCH and max(counts) > 1:
            rows = InvalidRow(REWRITTEN_ANSWER)
    elif tuple(map(num_trained_stretches, rows)) != counts:
        rows = InvalidRow(REWRITTEN_ANSWER)
    return _EncodedPair(rows, len(prompt))


def num_answers(messages: Messages) -> int:
    """Returns the number of answers in a completion."""
    return sum(message.role == "assistant" for message in messages)


def num_trained_stretches(row: Row) -> int:
    """Returns the number of unbroken stretches of trained tokens."""
    mask = row.completion_mask
    return sum(trained and not before for before, trained in zip([False, *mask], mask, strict=False))


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
    """Yields the prompt from its second question on, from the third on, and so on down to the last question."""
    system = prompt[:1] if prompt[0].role == "system" else ()
    questions = [index for index, message in enumerate(prompt) if message.role == "user"]
    for start in questions[1:]:
        yield (*system, *prompt[start:])
