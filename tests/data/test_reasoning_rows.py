"""The reasoning of an answer: read from the fields of a turn or from a column of its own, and kept apart from the
answer."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_tune.data import InvalidRow, to_conversation, to_pair
from lowrank_tune.data.message import Message, ToolCall
from lowrank_tune.data.messages import REASONING_KEYS

ASK, REPLY = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5."}
GIVEN = Message("assistant", "5.", "2 and 3.")


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_the_reasoning_of_a_turn_is_read(key: str) -> None:
    row = {"messages": [{**ASK, key: None}, {**REPLY, key: "2 and 3."}]}
    assert to_conversation(row, "messages", {}).messages == (Message("user", "2 + 3?"), GIVEN)
    shared = {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5.", key: "2 and 3."}]}
    assert to_conversation(shared, "sharegpt", {}).messages[1] == GIVEN
    pair = to_pair({"prompt": "2 + 3?", "chosen": {**REPLY, key: "2 and 3."}, "rejected": REPLY}, {})
    assert pair.chosen == (GIVEN,) and pair.rejected == (Message("assistant", "5."),)


def test_the_first_field_that_is_not_empty_counts() -> None:
    turn = {**REPLY, "reasoning_content": "", "reasoning": None, "thinking": "2 and 3."}
    assert to_conversation({"messages": [ASK, turn]}, "messages", {}).messages[1] == GIVEN


def test_fields_of_other_turns_and_thoughts_in_an_answer_stay_as_they_are() -> None:
    thought = {"role": "assistant", "content": "<think>2 and 3.</think>5."}
    row = {"messages": [{**ASK, "reasoning": {"effort": "high"}}, thought]}
    made = to_conversation(row, "messages", {}).messages
    assert made == (Message("user", "2 + 3?"), Message("assistant", "<think>2 and 3.</think>5."))


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({**REPLY, "reasoning": {"effort": "high"}}, "the reasoning of a turn is not text"),
        ({**REPLY, "thinking": "\ud800"}, "the reasoning of a turn contains a lone surrogate"),
        ({"role": "assistant", "content": "", "reasoning_content": "Hm."}, "empty answer"),
        ({"role": "assistant", "content": None, "reasoning_content": "Hm."}, "a turn has no content"),
    ],
)
def test_faulty_reasoning_has_a_reason(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        to_conversation({"messages": [ASK, turn]}, "messages", {})


@pytest.mark.parametrize(
    ("format_name", "row"),
    [
        ("question_answer", {"question": "2 + 3?", "answer": "5."}),
        ("alpaca", {"instruction": "2 + 3?", "output": "5."}),
        ("prompt_completion", {"prompt": "2 + 3?", "completion": "5."}),
    ],
)
def test_reasoning_may_have_a_column_of_its_own(format_name: str, row: dict[str, Any]) -> None:
    for columns, name in (({}, "reasoning_content"), ({"reasoning_content": "Complex_CoT"}, "Complex_CoT")):
        made = to_conversation({**row, name: "2 and 3."}, format_name, columns)
        assert made.messages[-1] == GIVEN and made.answer == "5."
    assert not to_conversation({**row, "reasoning": "2 and 3."}, format_name, {}).messages[-1].reasoning_content


def test_a_thought_before_a_call_stays_in_the_message_of_the_call() -> None:
    call = '<think>I look.</think>\n{"name": "f", "arguments": {}}'
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}]}
    expected = Message("assistant", "<think>I look.</think>", tool_calls=(ToolCall("f"),))
    assert to_conversation(row, "sharegpt", {}).messages[1] == expected
    turns = [
        ASK,
        {**REPLY, "content": "I look.", "reasoning": "One."},
        {"role": "assistant", "thinking": "Two.", "tool_calls": [{"name": "f"}]},
    ]
    made = to_conversation({"messages": turns}, "messages", {}).messages
    assert made[1] == Message("assistant", "I look.", "One.\n\nTwo.", (ToolCall("f"),))
