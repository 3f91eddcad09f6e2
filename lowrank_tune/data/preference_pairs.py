"""From the row of a data set to a preference pair: one prompt, a chosen and a rejected answer; and a reason for every
row that holds none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_tune.data.formats import (
    InvalidRow,
    RawExample,
    Turn,
    join_instruction_and_input,
    normalize_turns,
    system_of,
    text_of,
    turn_of,
    turns_of,
    value_of,
)
from lowrank_tune.data.message import Message

Messages = tuple[Message, ...]
PROMPT_COLUMNS = ("prompt", "instruction", "question", "problem", "query", "conversations", "conversation", "messages")
"""The columns where a prompt may stand, text or turns; `columns` maps any of them."""
HH_ROLE_PATTERN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
NO_PROMPT = "no prompt, and the sides do not hold one"
DIFFERENT_PROMPTS = "the sides have different questions"
EQUAL_ANSWERS = "both answers are equal"


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with the user, and two answers to it: each one turn or more, the first and the last the
    assistant's.

    `margin`: by how much the chosen one should be ahead, where the row says so.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0


def to_pair(row: RawExample, columns: Mapping[str, str]) -> PreferencePair:
    """The pair of a row; `InvalidRow` where it holds none."""
    if not isinstance(row, Mapping):
        raise InvalidRow("not an object with columns")
    prompt, is_transcript = _prompt(row, columns)
    system = system_of(row, columns)
    chosen, rejected = (
        _full_conversation(_side(row, name, columns, prompt is not None, is_transcript), prompt, system)
        for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise InvalidRow(EQUAL_ANSWERS)
    if prompt is None:
        messages = None
    else:
        messages = normalize_turns(_with_system_prompt(prompt, system), require_answer=False)
    if messages is None:
        length = _shared_turns(chosen, rejected)
    else:
        length = _prompt_length(messages, chosen, rejected)
    return PreferencePair(
        chosen[:length],
        chosen[length:],
        rejected[length:],
        _margin(row.get(columns.get("margin", "margin"))),
    )


def _prompt(row: RawExample, columns: Mapping[str, str]) -> tuple[list[Turn] | None, bool]:
    """The turns of the prompt's column, None where there is no such column; and whether it is a transcript up to the
    answer."""
    named = next((alias for alias in PROMPT_COLUMNS if alias in columns), None)
    alias = named or next((alias for alias in PROMPT_COLUMNS if row.get(alias) is not None), None)
    if alias is None:
        return None, False
    value = row.get(columns.get(alias, alias))
    if value is None:
        raise InvalidRow(f"no prompt in column `{columns[alias]}`")
    if isinstance(value, Mapping):
        return [turn_of(value)], False
    if isinstance(value, Sequence) and not isinstance(value, str):
        return turns_of(value, alias), False
    text = text_of(value, "prompt")
    if text.startswith("\n\nHuman:"):
        turns = _transcript(text)
        return (turns[:-1] if turns[-1] == ("assistant", "") else turns), True
    return [("user", join_instruction_and_input(text, row, columns) if alias == "instruction" else text)], False


def _side(
    row: RawExample,
    name: str,
    columns: Mapping[str, str],
    has_prompt: bool,
    is_transcript: bool,
) -> list[Turn]:
    """The turns of one side: an answer, with or without the turns before it; of a transcript without the layout around
    it."""
    value = value_of(row, "preference", name, columns)
    if isinstance(value, Mapping):
        return [turn_of(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise InvalidRow("empty answer")
        return turns_of(value, name)
    text = text_of(value, "answer")
    if text.startswith("\n\nHuman:") or (not has_prompt and text.lstrip().startswith("Human:")):
        return _transcript(text)
    if not has_prompt:
        raise InvalidRow(NO_PROMPT if text.strip() else "empty answer")
    return [("assistant", text.strip() if is_transcript else text)]


def _transcript(text: str) -> list[Turn]:
    """The turns of a text as HH-RLHF writes it. What stands around a turn is layout, not content."""
    pieces = HH_ROLE_PATTERN.split(text)[1:]
    return [
        ("user" if name == "Human" else "assistant", content.strip())
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _full_conversation(side: Sequence[Turn], prompt: Sequence[Turn] | None, system: Sequence[Turn]) -> Messages:
    """The conversation up to this side's last turn, which is the assistant's."""
    if side[0][0] != "assistant":
        system_turns = [*system, *(turn for turn in prompt or () if turn[0] == "system")][-1:]
        return normalize_turns(_with_system_prompt(side, system_turns), require_answer=True)
    if not prompt:
        raise InvalidRow(NO_PROMPT)
    if prompt[-1][0] == "assistant":
        raise InvalidRow("the prompt does not end with a question")
    return normalize_turns([*_with_system_prompt(prompt, system), *side], require_answer=True)


def _with_system_prompt(turns: Sequence[Turn], system: Sequence[Turn]) -> list[Turn]:
    if turns and turns[0][0] == "system":
        return list(turns)
    return [*system, *turns]


def _shared_turns(chosen: Messages, rejected: Messages) -> int:
    """How many turns two different talks have in common; the next one must be the assistant's in both."""
    length = next((index for index, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
    if length is None or not chosen[length].role == rejected[length].role == "assistant":
        raise InvalidRow(DIFFERENT_PROMPTS)
    return length


def _prompt_length(prompt: Messages, chosen: Messages, rejected: Messages) -> int:
    """How many turns of both talks the prompt is. A prompt may also be only the last question of what both sides
    hold."""
    if not prompt or prompt[-1].role != "user":
        raise InvalidRow("the prompt does not end with a question")
    length = len(prompt)
    if chosen[:length] == rejected[:length] and _equal_turns(chosen[:length], prompt):
        return length
    length = _shared_turns(chosen, rejected)
    if not _equal_turns(chosen[length - 1 : length], prompt[-1:]):
        raise InvalidRow(DIFFERENT_PROMPTS)
    return length


def _equal_turns(turns: Messages, others: Messages) -> bool:
    return [(turn.role, turn.content.strip()) for turn in turns] == [
        (turn.role, turn.content.strip()) for turn in others
    ]


def _margin(value: Any) -> float:
    """0 where the row has none. A table has numbers as text."""
    if value is None or value == "":
        return 0.0
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            margin = float(value)
        else:
            margin = -1.0
    except (ValueError, OverflowError):
        margin = -1.0
    if not 0.0 <= margin <= float(np.finfo(np.float32).max):
        raise InvalidRow("the margin is no number of at least 0")
    return margin
