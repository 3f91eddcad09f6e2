"""From the row of a data set to a preference pair: one prompt, a chosen and a rejected answer; and a reason for every
row that holds none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_tune.data.formats import (
    Raw,
    RowFault,
    Turn,
    system_of,
    text_of,
    tidy,
    turn_of,
    turns_of,
    value_of,
    with_input,
)
from lowrank_tune.types import Message

Talk = tuple[Message, ...]
PROMPTS = ("prompt", "instruction", "question", "problem", "query", "conversations", "conversation", "messages")
"""The columns where a prompt may stand, text or turns; `columns` maps any of them."""
MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
NO_PROMPT = "no prompt, and the sides do not hold one"
DIFFERENT = "the sides have different questions"
EQUAL = "both answers are equal"


@dataclass(frozen=True)
class Pair:
    """A prompt that ends with the user, and two answers to it: each one turn or more, the first and the last the
    assistant's.

    `margin`: by how much the chosen one should be ahead, where the row says so.
    """

    prompt: Talk
    chosen: Talk
    rejected: Talk
    margin: float = 0.0


def to_pair(row: Raw, columns: Mapping[str, str]) -> Pair:
    """The pair of a row; `RowFault` where it holds none."""
    if not isinstance(row, Mapping):
        raise RowFault("not an object with columns")
    prompt, is_transcript = _prompt(row, columns)
    system = system_of(row, columns)
    chosen, rejected = (
        _whole(_side(row, name, columns, prompt is not None, is_transcript), prompt, system)
        for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise RowFault(EQUAL)
    asked = None if prompt is None else tidy(_ruled(prompt, system), answered=False)
    length = _common(chosen, rejected) if asked is None else _asked(asked, chosen, rejected)
    return Pair(chosen[:length], chosen[length:], rejected[length:], _margin(row.get(columns.get("margin", "margin"))))


def _prompt(row: Raw, columns: Mapping[str, str]) -> tuple[list[Turn] | None, bool]:
    """The turns of the prompt's column, None where there is no such column; and whether it is a transcript up to the
    answer."""
    named = next((alias for alias in PROMPTS if alias in columns), None)
    alias = named or next((alias for alias in PROMPTS if row.get(alias) is not None), None)
    if alias is None:
        return None, False
    value = row.get(columns.get(alias, alias))
    if value is None:
        raise RowFault(f"no prompt in column `{columns[alias]}`")
    if isinstance(value, Mapping):
        return [turn_of(value)], False
    if isinstance(value, Sequence) and not isinstance(value, str):
        return turns_of(value, alias), False
    text = text_of(value, "prompt")
    if text.startswith("\n\nHuman:"):
        turns = _transcript(text)
        return (turns[:-1] if turns[-1] == ("assistant", "") else turns), True
    return [("user", with_input(text, row, columns) if alias == "instruction" else text)], False


def _side(row: Raw, name: str, columns: Mapping[str, str], has_prompt: bool, is_transcript: bool) -> list[Turn]:
    """The turns of one side: an answer, with or without the turns before it; of a transcript without the layout around
    it."""
    value = value_of(row, "preference", name, columns)
    if isinstance(value, Mapping):
        return [turn_of(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise RowFault("empty answer")
        return turns_of(value, name)
    text = text_of(value, "answer")
    if text.startswith("\n\nHuman:") or (not has_prompt and text.lstrip().startswith("Human:")):
        return _transcript(text)
    if not has_prompt:
        raise RowFault(NO_PROMPT if text.strip() else "empty answer")
    return [("assistant", text.strip() if is_transcript else text)]


def _transcript(text: str) -> list[Turn]:
    """The turns of a text as HH-RLHF writes it. What stands around a turn is layout, not content."""
    pieces = MARK.split(text)[1:]
    return [
        ("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _whole(side: Sequence[Turn], prompt: Sequence[Turn] | None, system: Sequence[Turn]) -> Talk:
    """The conversation up to this side's last turn, which is the assistant's."""
    if side[0][0] != "assistant":
        ruled = [*system, *(turn for turn in prompt or () if turn[0] == "system")][-1:]
        return tidy(_ruled(side, ruled), answered=True)
    if not prompt:
        raise RowFault(NO_PROMPT)
    if prompt[-1][0] == "assistant":
        raise RowFault("the prompt does not end with a question")
    return tidy([*_ruled(prompt, system), *side], answered=True)


def _ruled(turns: Sequence[Turn], system: Sequence[Turn]) -> list[Turn]:
    return list(turns) if turns and turns[0][0] == "system" else [*system, *turns]


def _common(chosen: Talk, rejected: Talk) -> int:
    """How many turns two different talks have in common; the next one must be the assistant's in both."""
    length = next((place for place, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
    if length is None or not chosen[length].role == rejected[length].role == "assistant":
        raise RowFault(DIFFERENT)
    return length


def _asked(asked: Talk, chosen: Talk, rejected: Talk) -> int:
    """How many turns of both talks the prompt is. A prompt may also be only the last question of what both sides
    hold."""
    if not asked or asked[-1].role != "user":
        raise RowFault("the prompt does not end with a question")
    length = len(asked)
    if chosen[:length] == rejected[:length] and _same(chosen[:length], asked):
        return length
    length = _common(chosen, rejected)
    if not _same(chosen[length - 1 : length], asked[-1:]):
        raise RowFault(DIFFERENT)
    return length


def _same(turns: Talk, others: Talk) -> bool:
    return [(turn.role, turn.content.strip()) for turn in turns] == [
        (turn.role, turn.content.strip()) for turn in others
    ]


def _margin(value: Any) -> float:
    """0 where the row has none. A table has numbers as text."""
    if value is None or value == "":
        return 0.0
    try:
        margin = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        margin = -1.0
    if not 0.0 <= margin <= float(np.finfo(np.float32).max):
        raise RowFault("the margin is no number of at least 0")
    return margin
