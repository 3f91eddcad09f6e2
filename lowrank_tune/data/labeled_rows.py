"""Answers with a label: from a row with a prompt, an answer and its label, or from a preference pair, to tokenized
rows.

The chosen answer of a pair is a desirable answer to its prompt, the rejected one an undesirable answer; the two are
rows of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank_tune.batch import Row
from lowrank_tune.config import SourceConfig
from lowrank_tune.data.encode import (
    PROMPT_MISMATCH,
    REWRITTEN_ANSWER,
    SourceContext,
    conversation_of,
    num_answers,
    num_trained_stretches,
    pair_of,
    shorter_prompts,
    too_long,
)
from lowrank_tune.data.formats import detect_format, value_of
from lowrank_tune.data.message import has_reasoning, has_tools
from lowrank_tune.data.messages import check_order, messages_of
from lowrank_tune.data.preference_pairs import EQUAL_ANSWERS, Messages
from lowrank_tune.data.report import ANSWER_INCLUDED
from lowrank_tune.data.row_values import Columns, InvalidRow, RawRow, RawRowOrFault, is_list
from lowrank_tune.data.scored_responses import has_scored_responses
from lowrank_tune.data.sources import Chunk
from lowrank_tune.data.store_writer import Entry, conversation_hash
from lowrank_tune.data.templates.chat_template import ChatTemplate
from lowrank_tune.data.templates.spans import NOTHING_TRAINED
from lowrank_tune.errors import UserError

UNPAIRED_PREFERENCE = "unpaired_preference"
LABELED_FORMATS = (UNPAIRED_PREFERENCE, "preference")
"""The formats that answers with a label are read from."""
LABEL_COLUMN = "label"
LABEL_TEXTS = {
    "true": True,
    "1": True,
    "1.0": True,
    "yes": True,
    "up": True,
    "thumbs up": True,
    "\N{THUMBS UP SIGN}": True,
    "desirable": True,
    "false": False,
    "0": False,
    "0.0": False,
    "no": False,
    "down": False,
    "thumbs down": False,
    "\N{THUMBS DOWN SIGN}": False,
    "undesirable": False,
}
"""Labels as text, in lower case and with spaces between words."""
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
INVALID_LABEL = "the label is neither true nor false (also read: 1 and 0, yes and no, thumbs up and thumbs down)"
NO_CONVERSATION = "no answer with its prompt: neither `prompt` with `completion`, nor `messages`"
NO_QUESTION = "the answer is to no question: the turn before it is neither the user's nor the result of a tool"


@dataclass(frozen=True)
class LabeledAnswer:
    """A prompt that ends with the user or the result of a tool, and an answer to it: one message or more, the first and
    the last the assistant's. `tools`: as in `Conversation`."""

    prompt: Messages
    completion: Messages
    label: bool
    tools: str = ""

    @property
    def messages(self) -> Messages:
        return (*self.prompt, *self.completion)


def detect_labeled_format(row: RawRow, columns: Columns) -> str:
    """Returns the format of a row with a label, or of a pair. A label that `columns` maps has precedence over a pair.
    Raises UserError."""
    present = {*columns, *(name for name, value in row.items() if value is not None)}
    is_pair = {"chosen", "rejected"} <= present or has_scored_responses(row, columns)
    if LABEL_COLUMN in columns or (LABEL_COLUMN in present and not is_pair):
        if _conversation_format(row, columns) is None:
            raise UserError(f"the columns {_names(row)} have {NO_CONVERSATION}: name yours with `columns:`")
        return UNPAIRED_PREFERENCE
    if is_pair:
        return "preference"
    raise UserError(
        f"the columns {_names(row)} have no label, which `algorithm: kto` learns from; expected `prompt`, `completion` "
        "and `label` (true or false), or pairs with `chosen` and `rejected`: name yours with `columns:`, as in "
        "`columns: {completion: answer, label: thumbs_up}`"
    )


def _names(row: RawRow) -> str:
    names = ", ".join(sorted(map(str, row)))
    return names.encode("utf-8", "replace").decode() or "(none)"


def _conversation_format(row: RawRow, columns: Columns) -> str | None:
    """Returns the format of a row as if it had no label; None without an answer."""
    others = {name: column for name, column in columns.items() if name != LABEL_COLUMN}
    try:
        found = detect_format(row, others)
    except UserError:
        return None
    return None if found == "preference" else found


def labeled_answers(
    raw: RawRowOrFault,
    source: SourceConfig,
    format_name: str,
    system: str | None,
) -> list[LabeledAnswer]:
    """Returns the answer of a row, or both of a pair, with the recipe's system prompt if it has none. Raises
    InvalidRow."""
    if isinstance(raw, InvalidRow):
        raise raw
    if format_name == "preference":
        pair = pair_of(raw, source, system)
        sides = ((pair.chosen, True), (pair.rejected, False))
        return [LabeledAnswer(pair.prompt, side, label, pair.tools) for side, label in sides]
    return [_answer_of(raw, source, system)]


def _answer_of(
    raw: RawRow,
    source: SourceConfig,
    system: str | None,
) -> LabeledAnswer:
    label = read_label(raw, source.columns)
    format_name = _conversation_format(raw, source.columns)
    if format_name is None:
        raise InvalidRow(NO_CONVERSATION)
    conversation = conversation_of(
        raw,
        source,
        format_name,
        system,
    )
    messages = conversation.messages
    length = _prompt_length(
        raw,
        source.columns,
        format_name,
        messages,
    )
    if length < 1 or messages[length - 1].role not in ("user", "tool"):
        raise InvalidRow(NO_QUESTION)
    return LabeledAnswer(
        messages[:length],
        messages[length:],
        label,
        conversation.tools,
    )


def _prompt_length(
    row: RawRow,
    columns: Columns,
    format_name: str,
    messages: Messages,
) -> int:
    """Returns how many messages precede the answer: those of the prompt if the completion is a list of turns, else all
    but the last one. Raises InvalidRow."""
    if format_name != "prompt_completion" or not is_list(value_of(row, "completion", columns)):
        return len(messages) - 1
    prompt = value_of(row, "prompt", columns)
    if not is_list(prompt):
        return 1 + (messages[0].role == "system")
    turns = check_order(messages_of(prompt, "prompt"), require_answer=False)
    is_system_added = messages[0].role == "system" and turns[0].role != "system"
    return len(turns) + is_system_added


def read_label(row: RawRow, columns: Columns) -> bool:
    """Returns whether the answer of a row is desirable. Raises InvalidRow."""
    column = columns.get(LABEL_COLUMN, LABEL_COLUMN)
    value = row.get(column)
    if value is None:
        raise InvalidRow(f"column `{column}` is null" if column in row else f"no column `{column}`")
    label = _to_label(value)
    if label is None:
        raise InvalidRow(INVALID_LABEL)
    return label


def _to_label(value: Any) -> bool | None:
    if isinstance(value, str):
        words = value.translate(dict.fromkeys(map(ord, SKIN_TONES))).lower()
        # Tables write the numbers of a column with gaps as 1.0 and 0.0. The sign of -1 is no hyphen.
        words = re.sub(r"(?<=[a-z])[-_](?=[a-z])", " ", words)
        return LABEL_TEXTS.get(" ".join(words.split()))
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def encode_labeled_chunk(chunk: Chunk, context: SourceContext) -> Iterator[Sequence[Entry] | InvalidRow]:
    """Yields for every row of a chunk, in order, its tokenized answers or its fault. Of a pair both answers are used,
    or none."""
    items = [_read_row(raw, context) for _, raw in chunk]
    answers = [answer for item in items if not isinstance(item, InvalidRow) for answer in item]
    encoded = iter(encode_answers(answers, context.template))
    for (location, _), item in zip(chunk, items, strict=True):
        if isinstance(item, InvalidRow):
            yield item
            continue
        rows = [_fit(answer, next(encoded), context) for answer in item]
        fault = _first_fault(rows)
        if fault is not None:
            yield fault
            continue
        if any(row.is_shortened for row in rows):
            context.report.count_truncated(str(location))
        yield [_entry(answer, row) for answer, row in zip(item, rows, strict=True)]


def _read_row(raw: RawRowOrFault, context: SourceContext) -> list[LabeledAnswer] | InvalidRow:
    try:
        return labeled_answers(
            raw,
            context.source,
            context.report.format,
            context.data.system_prompt,
        )
    except InvalidRow as fault:
        return fault


@dataclass(frozen=True)
class EncodedAnswer:
    """The row of an answer, or its fault, and the length of its prompt in tokens. `is_shortened`: turns of its prompt
    were removed."""

    row: Row | InvalidRow
    prompt_length: int = 0
    is_shortened: bool = False

    @property
    def length(self) -> int:
        """Tokens of the row, 0 without one."""
        return 0 if isinstance(self.row, InvalidRow) else len(self.row.input_ids)


def encode_answers(answers: Sequence[LabeledAnswer], template: ChatTemplate) -> list[EncodedAnswer]:
    """Returns the rows of answers, of which only the answer is trained."""
    tools = [answer.tools for answer in answers]
    rows = template.encode_many([answer.messages for answer in answers], tools)
    prompts = template.prompt_many([answer.prompt for answer in answers], tools)
    return [
        _mask_prompt(
            answer,
            prompt,
            row,
        )
        for answer, prompt, row in zip(answers, prompts, rows, strict=True)
    ]


def _mask_prompt(
    answer: LabeledAnswer,
    prompt: list[int] | InvalidRow,
    row: Row | InvalidRow,
) -> EncodedAnswer:
    if isinstance(row, InvalidRow):
        return EncodedAnswer(row)
    if isinstance(prompt, InvalidRow):
        return EncodedAnswer(prompt)
    length = len(prompt)
    num_expected = num_answers(answer.completion)
    if list(row.input_ids[:length]) != prompt:
        return EncodedAnswer(InvalidRow(REWRITTEN_ANSWER if num_expected > 1 else PROMPT_MISMATCH))
    trained = row.completion_mask[length:]
    if not any(trained):
        return EncodedAnswer(InvalidRow(NOTHING_TRAINED))
    masked = Row(row.input_ids, [*[False] * length, *trained])
    if num_trained_stretches(masked) != num_expected:
        return EncodedAnswer(InvalidRow(REWRITTEN_ANSWER))
    return EncodedAnswer(masked, length)


def _fit(
    answer: LabeledAnswer,
    encoded: EncodedAnswer,
    context: SourceContext,
) -> EncodedAnswer:
    """Returns the row if it is short enough, else one without the oldest exchanges of its prompt, as few as possible,
    or a fault. No answer is ever cut, and the last question stays."""
    data = context.data
    context.report.longest = max(context.report.longest, encoded.length)
    if encoded.length <= data.max_length:
        return encoded
    part = "prompt"
    prompt_length = encoded.prompt_length
    if data.truncation == "truncate":
        part = "last question"
        for prompt in shorter_prompts(answer.prompt):
            shorter = replace(answer, prompt=prompt)
            (cut,) = encode_answers([shorter], context.template)
            if cut.length <= data.max_length:
                return EncodedAnswer(cut.row, cut.prompt_length, is_shortened=True)
            prompt_length = cut.prompt_length
    reason = too_long(data)
    if prompt_length > data.max_length:
        reason += f", its {part} alone"
    elif data.truncation == "truncate":
        reason += f", its last question and its {ANSWER_INCLUDED}"
    return EncodedAnswer(InvalidRow(reason))


def _first_fault(rows: Sequence[EncodedAnswer]) -> InvalidRow | None:
    """Returns the fault of the first row that has one, or of two rows with equal ids; None without a fault."""
    for row in rows:
        if isinstance(row.row, InvalidRow):
            return row.row
    ids = [tuple(row.row.input_ids) for row in rows if isinstance(row.row, Row)]
    # The template may drop what the answers of a pair differ in, such as spaces at the end.
    if len(set(ids)) < len(ids):
        return InvalidRow(EQUAL_ANSWERS)
    return None


def _entry(answer: LabeledAnswer, encoded: EncodedAnswer) -> Entry:
    """Returns the row for the store. Answers to one prompt, and so equal conversations, stay in one part of a split."""
    assert isinstance(encoded.row, Row)
    return Entry(
        (encoded.row,),
        (conversation_hash(answer.messages, answer.tools),),
        has_reasoning=has_reasoning(answer.messages),
        has_tools=has_tools(answer.messages, answer.tools),
        label=answer.label,
        split_hash=conversation_hash(answer.prompt, answer.tools),
    )
