"""From the row of a data set to a preference pair: one prompt, a chosen and a rejected answer; and a reason for every
row that has none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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
from lowrank_tune.data.tool_calls import tools_of

Messages = tuple[Message, ...]
PROMPT_COLUMNS = ("prompt", "instruction", "question", "problem", "query", "conversations", "conversation", "messages")
"""The columns that may contain a prompt, as text or as turns; `columns` maps any of them."""
HH_ROLE_PATTERN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
NO_PROMPT = "no prompt, and the answers do not contain one"
NO_QUESTION = "the prompt does not end with a question"
DIFFERENT_PROMPTS = "the sides have different questions"
EQUAL_ANSWERS = "both answers are equal"
INVALID_MARGIN = "the margin is not a number of at least 0"


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with the user, and two answers to it: each one message or more, the first and the last the
    assistant's.

    `margin`: by how much the chosen answer should be ahead, if the row has one. `tools`: as in `Conversation`.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0
    tools: str = ""


@dataclass(frozen=True)
class _Prompt:
    """The messages of the column of a prompt. `is_transcript`: they come from a text of HH-RLHF."""

    messages: list[Message]
    is_transcript: bool = False


def to_pair(row: RawRow, columns: Columns) -> PreferencePair:
    """Returns the pair of a row. Raises InvalidRow."""
    if not isinstance(row, Mapping):
        raise InvalidRow("not an object with columns")
    prompt = _read_prompt(row, columns)
    system = system_of(row, columns)
    chosen = _read_side(
        row,
        "chosen",
        columns,
        prompt,
        system,
    )
    rejected = _read_side(
        row,
        "rejected",
        columns,
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
        _margin(row.get(columns.get("margin", "margin"))),
        tools_of(row, columns),
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
    if text.startswith("\n\nHuman:"):
        messages = _read_transcript(text)
        if messages[-1] == Message("assistant", ""):
            messages.pop()
        return _Prompt(messages, is_transcript=True)
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
    return None


def _read_side(
    row: RawRow,
    name: str,
    columns: Columns,
    prompt: _Prompt | None,
    system: Sequence[Message],
) -> Messages:
    """Returns the conversation up to the last message of one side, which is the assistant's."""
    side = _side_messages(row, name, columns, prompt)
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
    row: RawRow,
    name: str,
    columns: Columns,
    prompt: _Prompt | None,
) -> list[Message]:
    """Returns the messages of one side: an answer, with or without the messages before it."""
    value = value_of(row, name, columns)
    if isinstance(value, Mapping):
        return [message_of(value)]
    if is_list(value):
        if not value:
            raise InvalidRow("empty answer")
        return messages_of(value, name)
    text = text_of(value, "answer")
    if text.startswith("\n\nHuman:"):
        return _read_transcript(text)
    if prompt is None:
        if text.lstrip().startswith("Human:"):
            return _read_transcript(text)
        raise InvalidRow(NO_PROMPT if text.strip() else "empty answer")
    if prompt.is_transcript:
        text = text.strip()
    return [Message("assistant", text)]


def _read_transcript(text: str) -> list[Message]:
    """Returns the messages of a text in the format of HH-RLHF. White space around a message is layout, not content."""
    pieces = HH_ROLE_PATTERN.split(text)[1:]
    messages = []
    for name, content in zip(pieces[::2], pieces[1::2], strict=True):
        if name == "Human":
            messages.append(Message("user", content.strip()))
        else:
            messages.append(Message("assistant", content.strip()))
    return messages


def _with_system(messages: Sequence[Message], system: Sequence[Message]) -> list[Message]:
    if messages and messages[0].role == "system":
        return list(messages)
    return [*system, *messages]


def _shared_messages(chosen: Messages, rejected: Messages) -> int:
    """Returns how many messages two different conversations share. Raises InvalidRow if the next one is not the
    assistant's in both."""
    for index, (message, other) in enumerate(zip(chosen, rejected, strict=False)):
        if message == other:
            continue
        if message.role == other.role == "assistant":
            return index
        break
    raise InvalidRow(DIFFERENT_PROMPTS)


def _prompt_length(
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
) -> int:
    """Returns how many messages of both conversations are the prompt. A prompt may also be only the last question of
    what both sides contain."""
    if not prompt or prompt[-1].role != "user":
        raise InvalidRow(NO_QUESTION)
    length = len(prompt)
    if chosen[:length] == rejected[:length] and _equal_messages(chosen[:length], prompt):
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


def _margin(value: Any) -> float:
    """Returns the margin of a row, 0 without one. Tables contain numbers as text. Raises InvalidRow."""
    if value is None or value == "":
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidRow(INVALID_MARGIN)
    try:
        margin = float(value)
    except (ValueError, OverflowError) as error:
        raise InvalidRow(INVALID_MARGIN) from error
    if not 0.0 <= margin <= float(np.finfo(np.float32).max):
        raise InvalidRow(INVALID_MARGIN)
    return margin
