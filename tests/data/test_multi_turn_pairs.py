"""Pairs of conversations that differ from any turn on: the prompt is their common beginning, up to an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_pairs import TEMPLATE, encoded, turns

from lowrank_tune.batch import Row
from lowrank_tune.data import InvalidRow, PreferencePair, to_pair
from lowrank_tune.data.encode import shorter_prompts
from lowrank_tune.data.message import Message
from lowrank_tune.data.store_writer import Entry

CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
RESULT = {"role": "tool", "content": "5"}
ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def roles(pair: PreferencePair) -> tuple[str, str, str]:
    return tuple("".join(message.role[0] for message in part) for part in (pair.prompt, pair.chosen, pair.rejected))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (turns("q", "a"), turns("q", "b"), ("u", "a", "a")),
        (turns("q", "a", "r", "b"), turns("q", "a", "r", "c"), ("uau", "a", "a")),
        (turns("q", "a", "r", "b"), turns("q", "x", "r", "b"), ("u", "aua", "aua")),
        (turns("q", "a", "r", "b"), turns("q", "a", "x", "b"), ("u", "aua", "aua")),
        (turns("q", "a", "r", "b"), turns("q", "a"), ("u", "aua", "a")),
        (turns("q", "a"), turns("q", "a", "r", "b", "s", "c"), ("u", "a", "auaua")),
        (turns("q", "a", "r", "b"), turns("q", "c"), ("u", "aua", "a")),
        (turns("q", "a", "r", "b", "s", "c"), turns("q", "a", "r", "b", "t", "d"), ("uau", "aua", "aua")),
        ([ASK, CALL, RESULT, ANSWER], [ASK, ANSWER], ("u", "ata", "a")),
        ([ASK, CALL, RESULT, ANSWER], [ASK, CALL, RESULT, {**ANSWER, "content": "b"}], ("uat", "a", "a")),
        ([ASK, CALL, RESULT, ANSWER], [ASK, CALL, {**RESULT, "content": "6"}, ANSWER], ("u", "ata", "ata")),
        ([ASK, CALL, RESULT, RESULT, ANSWER], [ASK, CALL, RESULT, ANSWER], ("u", "atta", "ata")),
        ([ASK, CALL], [ASK, ANSWER], ("u", "a", "a")),
    ],
)
def test_the_prompt_is_the_common_beginning_up_to_an_answer(
    chosen: list[Any], rejected: list[Any], expected: tuple[str, str, str]
) -> None:
    made = to_pair({"chosen": chosen, "rejected": rejected}, {})
    assert roles(made) == expected
    swapped = to_pair({"chosen": rejected, "rejected": chosen}, {})
    assert (swapped.prompt, swapped.chosen, swapped.rejected) == (made.prompt, made.rejected, made.chosen)


def test_a_prompt_may_end_with_a_result() -> None:
    row = {
        "prompt": [ASK, CALL, RESULT],
        "chosen": [ANSWER],
        "rejected": [{**ANSWER, "content": "b"}],
        "tools": [{"name": "add"}],
    }
    made = to_pair(row, {})
    assert roles(made) == ("uat", "a", "a") and json.loads(made.tools)[0]["function"] == {"name": "add"}
    whole = {**row, "chosen": [*row["prompt"], ANSWER], "rejected": [ASK, CALL, RESULT, RESULT, ANSWER]}
    assert roles(to_pair({**whole, "prompt": [ASK]}, {})) == ("u", "ata", "atta")
    with pytest.raises(InvalidRow, match="different questions"):
        to_pair({**whole, "prompt": [ASK, CALL, {**RESULT, "content": "7"}]}, {})


def test_conversations_that_share_nothing_keep_their_reason() -> None:
    for chosen, rejected in (
        (turns("q", "a"), turns("r", "a")),
        (turns("s", "q", "a", first="system"), turns("s", "r", "b", first="system")),
        (turns("s", "q", "a", first="system"), turns("t", "q", "b", first="system")),
    ):
        with pytest.raises(InvalidRow, match="different questions"):
            to_pair({"chosen": chosen, "rejected": rejected}, {})


def trained_texts(row: Row) -> list[str]:
    """The trained stretches of a row, without control tokens."""
    texts: list[str] = []
    stretch: list[int] = []
    for token, trained in [*zip(row.input_ids, row.completion_mask, strict=True), (0, False)]:
        if trained:
            stretch.append(int(token))
        elif stretch:
            texts.append(TEMPLATE.decode(stretch).strip())
            stretch = []
    return texts


words = st.lists(st.sampled_from(["a", "b", "cc", "d 1"]), min_size=2, max_size=6).filter(
    lambda words: len(words) % 2 == 0
)


@settings(max_examples=60)
@given(chosen=words, rejected=words)
def test_only_answers_after_the_common_prompt_are_trained(chosen: list[str], rejected: list[str]) -> None:
    assume(chosen != rejected and chosen[0] == rejected[0])
    row = {"chosen": turns(*chosen), "rejected": turns(*rejected)}
    pair = to_pair(row, {})
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    length = same if same % 2 else same - 1
    assert len(pair.prompt) == length and pair.prompt[-1].role == "user"
    ((made,), _) = encoded(TEMPLATE, row)
    assert isinstance(made, Entry)
    assert [trained_texts(side) for side in made.rows] == [chosen[length::2], rejected[length::2]]


def test_a_prompt_is_shortened_to_whole_exchanges() -> None:
    """A result stays with its call, and every shorter prompt begins with a question."""
    made = to_pair({"prompt": [ASK, CALL, RESULT, ANSWER, ASK, ANSWER, ASK], "chosen": "b", "rejected": "c"}, {})
    system = Message("system", "s")
    shorter = list(shorter_prompts((system, *made.prompt)))
    assert ["".join(message.role[0] for message in prompt) for prompt in shorter] == ["suau", "su"]
