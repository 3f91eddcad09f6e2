"""From the row of a data set to a preference pair: one prompt, a chosen and a rejected answer; and a reason for every
row that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank_tune.data.formats import join_instruction_and_input, value_of
from lowrank_tune.data.message import Message
from lowrank_tune.data.messages import (
    check_order,
    message_of,
    messages_of,
    system_of,
)
from lowrank_tune.data.row_values import (
    Columns,
    InvalidRow,
    RawRow,
    is_list,
    text_of,
)
from lowrank_tune.data.scored_responses import (
    Sides,
    checked_margin,
    margin_of,
    scored_sides,
    side_difference,
)
from lowrank_tune.data.tool_calls import tools_of
from lowrank_tune.data.transcripts import (
    HH_START,
    read_prompt_transcript,
    read_transcript,
)

Messages = tuple[Message, ...]
PROMPT_COLUMNS = ("prompt", "instruction", "question", "problem", "query", "conversations", "conversation", "messages")
"""The columns that may contain a prompt, as text or as turns; `columns` maps any of them."""
CONTEXT_COLUMN = "context"
"""A column that is a prompt if it contains turns, as in HelpSteer3. Elsewhere a text in it belongs to a question."""
NO_PROMPT = "no prompt, and the answers do not contain one"
NO_QUESTION = "the prompt does not end with a question"
DIFFERENT_PROMPTS = "the sides have different questions"
EQUAL_ANSWERS = "both answers are equal"


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with the user or the result of a tool, and two answers to it: each one message or more, the
    first and the last the assistant's. Messages of the user and results of tools between them are context.

    `margin`: by how much the chosen answer should be ahead, if the row has one. `tools`: as in `Conversation`.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0
    tools: str = ""


@dataclass(frozen=True)
class _Prompt:
    """The messages of the column of a prompt. `is_transcript`: they come from one text, see `transcripts`."""

    messages: list[Message]
    is_transcript: bool = False


def to_pair(
    row: RawRow,
    columns: Columns,
    score_margin_scale: float = 0.0,
) -> PreferencePair:
    """Returns the pair of a row. Raises InvalidRow.

    Without a margin of its own the margin is the difference of the scores of both sides times `score_margin_scale`.
    """
    if not isinstance(row, Mapping):
        raise InvalidRow("not an object with columns")
    prompt = _read_prompt(row, columns)
    system = system_of(row, columns)
    sides = _sides_of(row, columns)
    chosen = _read_side(
        sides.chosen,
        "chosen",
        prompt,
        system,
    )
    rejected = _read_side(
        sides.rejected,
        "rejected",
        prompt,
        system,
    )
    if chosen == rejected:
        raise InvalidRow(EQUAL_ANSWERS)
    if prompt is None:
        length = _shared_messages(chosen, rejected)
    else:
        messages = check_order(_with_system(prompt.messages, system), require_answer=False)
        length = _prompt_length(messages, chosen, rejected)
    return PreferencePair(
        chosen[:length],
        chosen[length:],
        rejected[length:],
        _margin(
            row,
            columns,
            sides,
            score_margin_scale,
        ),
        tools_of(row, columns),
    )


def _sides_of(row: RawRow, columns: Columns) -> Sides:
    scored = scored_sides(row, columns)
    if scored is not None:
        return scored
    return Sides(
        value_of(row, "chosen", columns),
        value_of(row, "rejected", columns),
    )


def _read_prompt(row: RawRow, columns: Columns) -> _Prompt | None:
    """Returns the prompt of the first of `PROMPT_COLUMNS` that is mapped or present; None without such a column."""
    alias = _prompt_column(row, columns)
    if alias is None:
        return None
    value = row.get(columns.get(alias, alias))
    if value is None:
        raise InvalidRow(f"no prompt in column `{columns[alias]}`")
    if isinstance(value, Mapping):
        return _Prompt([message_of(value)])
    if is_list(value):
        return _Prompt(messages_of(value, alias))
    text = text_of(value, "prompt")
    transcript = read_prompt_transcript(text)
    if transcript is not None:
        return _Prompt(transcript, is_transcript=True)
    if alias == "instruction":
        text = join_instruction_and_input(text, row, columns)
    return _Prompt([Message("user", text)])


def _prompt_column(row: RawRow, columns: Columns) -> str | None:
    for alias in PROMPT_COLUMNS:
        if alias in columns:
            return alias
    for alias in PROMPT_COLUMNS:
        if row.get(alias) is not None:
            return alias
    return CONTEXT_COLUMN if is_list(row.get(CONTEXT_COLUMN)) else None


def _read_side(
    value: Any,
    name: str,
    prompt: _Prompt | None,
    system: Sequence[Message],
) -> Messages:
    """Returns the conversation up to the last message of one side, which is the assistant's."""
    side = _side_messages(value, name, prompt)
    if side[0].role != "assistant":
        if prompt is not None:
            system = [*system, *(message for message in prompt.messages if message.role == "system")][-1:]
        return check_order(_with_system(side, system), require_answer=True)
    if prompt is None or not prompt.messages:
        raise InvalidRow(NO_PROMPT)
    if prompt.messages[-1].role == "assistant":
        raise InvalidRow(NO_QUESTION)
    return check_order([*_with_system(prompt.messages, system), *side], require_answer=True)


def _side_messages(
    value: Any,
    name: str,
    prompt: _Prompt | None,
) -> list[Message]:
    """Returns the messages of one side: an answer, with or without the messages before it."""
    if isinstance(value, Mapping):
        return [message_of(value)]
    if is_list(value):
        if not value:
            raise InvalidRow("empty answer")
        return messages_of(value, name)
    text = text_of(value, "answer")
    if text.startswith(HH_START):
        return read_transcript(text)
    if prompt is None:
        if text.lstrip().startswith("Human:"):
            return read_transcript(text)
        raise InvalidRow(NO_PROMPT if text.strip() else "empty answer")
    if prompt.is_transcript:
        text = text.strip()
    return [Message("assistant", text)]


def _with_system(messages: Sequence[Message], system: Sequence[Message]) -> list[Message]:
    if messages and messages[0].role == "system":
        return list(messages)
    return [*system, *messages]


def _shared_messages(chosen: Messages, rejected: Messages) -> int:
    """Returns how many messages at the beginning of two different conversations are the prompt of both: as many as are
    equal, and after which both continue with the assistant. Raises InvalidRow without any.

    Conversations that differ in a message of the user, or of which one is the beginning of the other, have the answer
    before that in both sides.
    """
    length = 0
    for index, (message, other) in enumerate(zip(chosen, rejected, strict=False)):
        if message.role == other.role == "assistant":
            length = index
        if message != other:
            break
    if not length:
        raise InvalidRow(DIFFERENT_PROMPTS)
    return length


def _prompt_length(
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
) -> int:
    """Returns how many messages of both conversations are the prompt. A prompt may also be only the last question of
    what both sides contain."""
    if not prompt or prompt[-1].role not in ("user", "tool"):
        raise InvalidRow(NO_QUESTION)
    length = len(prompt)
    is_prompt = chosen[:length] == rejected[:length] and _equal_messages(chosen[:length], prompt)
    if is_prompt and chosen[length].role == rejected[length].role == "assistant":
        return length
    length = _shared_messages(chosen, rejected)
    if not _equal_messages(chosen[length - 1 : length], prompt[-1:]):
        raise InvalidRow(DIFFERENT_PROMPTS)
    return length


def _equal_messages(messages: Messages, others: Messages) -> bool:
    """Returns whether messages are equal but for white space around them."""
    return _stripped(messages) == _stripped(others)


def _stripped(messages: Messages) -> list[Message]:
    return [replace(message, content=message.content.strip()) for message in messages]


def _margin(
    row: RawRow,
    columns: Columns,
    sides: Sides,
    score_margin_scale: float,
) -> float:
    """Returns the margin of a row, or that of its scores, else 0. Raises InvalidRow."""
    margin = margin_of(row, columns)
    if margin is not None:
        return margin
    if not score_margin_scale:
        return 0.0
    difference = sides.difference
    if difference is None:
        difference = side_difference(row, columns)
    if difference is None:
        return 0.0
    return checked_margin(score_margin_scale * difference)
