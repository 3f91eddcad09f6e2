"""Shapes of rows: what is read, what is refused and why, and where the gold answer is."""

from __future__ import annotations

from typing import Any

import pytest
from code_rows import HUMANEVAL, MBPP, MBPP_SANITIZED
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_tune.data import InvalidRow, detect_format, to_conversation
from lowrank_tune.data.ground_truth import last_boxed, last_number
from lowrank_tune.errors import UserError

Q, A = "What is 2 + 3?", "It is 5."
CHAT = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
GPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
GOOD = {
    "messages": [{"messages": CHAT}, {"messages": CHAT, "prompt": Q}, {"messages": CHAT, "problem": Q, "solution": A}],
    "sharegpt": [{"conversations": GPT}, {"conversations": CHAT}, {"conversations": GPT, "system": ""}],
    "alpaca": [
        {"instruction": Q, "input": "", "output": A},
        {"instruction": "What is", "input": "2 + 3?", "output": A},
    ],
    "prompt_completion": [{"prompt": Q, "completion": A}, {"prompt": CHAT[:1], "completion": CHAT[1:]}],
    "question_answer": [
        {"question": Q, "answer": A},
        {"query": Q, "response": A},
        {"problem": Q, "generated_solution": A},
    ],
}


@pytest.mark.parametrize(("shape", "row"), [(shape, row) for shape, rows in GOOD.items() for row in rows])
def test_each_format_becomes_the_same_conversation(shape: str, row: dict[str, Any]) -> None:
    assert detect_format(row) == shape
    made = to_conversation(row, shape, {})
    question = "What is\n\n2 + 3?" if row.get("input") else Q
    assert [(message.role, message.content) for message in made.messages] == [("user", question), ("assistant", A)]


def test_mapped_columns_are_read() -> None:
    row = {"problem": "p", "messages": CHAT, "rationale": "because", "Answer": 51.0}
    assert detect_format(row) == "messages"
    columns = {"question": "problem", "answer": "rationale"}
    assert detect_format(row, columns) == "question_answer"
    assert to_conversation(row, "question_answer", columns).messages[1].content == "because"
    assert (
        to_conversation(row, "question_answer", {"question": "problem", "answer": "Answer"}).messages[1].content == "51"
    )
    assert to_conversation(row, "question_answer", {**columns, "gold": "Answer"}).ground_truth == "51"
    with pytest.raises(UserError, match="winner.*known format.*preference.*columns:"):
        detect_format({"winner": 1, "loser": 2})


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": role[:1] or "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turns("user"), "no assistant turn"),
        (turns("user", "assistant", "user"), "last turn is the user's"),
        (turns(), "no turns"),
        (turns("user", "assistant", "assistant"), "two assistant"),
        (turns("assistant"), "first turn is the assistant"),
        (turns("user", "assistant", "system"), "system turn"),
        (turns("user", "wizard"), "unknown role"),
        (turns("user", "tool", "assistant"), "a tool result without a tool call before it"),
        ({"messages": None}, "null"),
        ({}, "no column"),
        ({"messages": "text"}, "not a list"),
        ({"messages": ["text"]}, "not an object"),
        ({"messages": [{"role": 3, "content": "a"}]}, "no role"),
        ({"messages": [{"role": "user", "content": " "}, CHAT[1]]}, "empty question"),
        ({"messages": [CHAT[0], {"role": "gpt", "content": ""}]}, "empty answer"),
        ({"messages": [CHAT[0], {"role": "gpt", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [CHAT[0], {"role": "gpt", "content": True}]}, "is not text"),
        ({"messages": [CHAT[0], {"role": "gpt", "content": None, "tool_calls": [1]}]}, "call is not an object"),
        ("text", "not an object"),
    ],
)
def test_a_row_that_is_not_a_conversation_has_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        to_conversation(row, "messages", {})


def test_two_user_turns_in_a_row_are_joined() -> None:
    made = to_conversation(turns("system", "user", "user", "assistant"), "messages", {})
    assert [message.content for message in made.messages] == ["s", "u\n\nu", "a"]
    assert len(to_conversation({"messages": [{"role": "system", "content": ""}, *CHAT]}, "messages", {}).messages) == 2


@pytest.mark.parametrize(
    ("row", "how", "gold"),
    [
        ({"answer": "#### Step 2:\nSo \\boxed{5}."}, "auto", "5"),
        ({"answer": "#### Part (a)\nIt holds."}, "auto", None),
        ({"answer": "So 5.\n#### 1,234"}, "auto", "1234"),
        ({"answer": "x #### -3 \nThe answer is: -3"}, "auto", "-3"),
        ({"answer": "5 apples"}, "auto", None),
        ({"answer": "-12,000.5"}, "auto", "-12000.5"),
        ({"answer": r"\boxed{1} or \boxed{\frac{1}{2}}."}, "auto", r"1, \frac{1}{2}"),
        ({"answer": r"First \boxed{1}. Then \boxed{2}."}, "boxed", "2"),
        ({"answer": r"\boxed{7} \boxed{8"}, "auto", "7"),
        ({"answer": r"\boxed{\{1,2\}}"}, "auto", r"\{1,2\}"),
        ({"answer": "7", "gold": "8"}, "auto", "8"),
        ({"answer": "7", "expected_answer": 9}, "auto", "9"),
        ({"answer": "is 7."}, "answer", "is 7."),
        ({"answer": "#### 7"}, "none", None),
        ({"answer": "a 7 b 1,000 c"}, "last_number", "1000"),
        ({"answer": "7"}, "gold", None),
        ({"answer": "7"}, "hashes", None),
        ({"answer": "1,2"}, "auto", "1,2"),
    ],
)
def test_the_gold_answer_by_each_rule(row: dict[str, Any], how: str, gold: str | None) -> None:
    if row["answer"] == "1,2":  # a pair, not a number: neither a gold answer by itself nor stripped of its comma
        assert to_conversation({"question": "q", **row}, "question_answer", {}, "answer").ground_truth == "1,2"
        return
    assert to_conversation({"question": "q", **row}, "question_answer", {}, how).ground_truth == gold


def test_last_number_and_last_box_of_a_text() -> None:
    assert [last_number(text) for text in ("5-3", "is -3", "x", "3.50.", "(-4)")] == ["3", "-3", None, "3.50", "-4"]
    assert last_boxed(r"\boxed {3} \boxed") == "3"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**600), 10**600)
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value"]), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(
    [
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "history",
        "prompt",
        "completion",
        "question",
        "answer",
        "gold",
        "system",
    ]
)


@settings(max_examples=300)
@given(
    row=st.dictionaries(names, values) | values,
    shape=st.sampled_from(sorted(GOOD)),
    how=st.sampled_from(["auto", "answer", "hashes", "boxed", "last_number", "gold"]),
)
def test_random_rows_become_conversations_or_reasons(row: Any, shape: str, how: str) -> None:
    try:
        made = to_conversation(row, shape, {}, how)
    except InvalidRow:
        return
    assert made.messages[-1].role == "assistant" and all(message.content.encode() for message in made.messages)


@pytest.mark.parametrize(
    ("row", "format_name", "question", "answer"),
    [
        (HUMANEVAL, "humaneval", HUMANEVAL["prompt"], HUMANEVAL["canonical_solution"]),
        (MBPP, "mbpp", "double(2) == 4", MBPP["code"]),
        (MBPP_SANITIZED, "mbpp", "double(2) == 4", MBPP["code"]),
    ],
)
def test_rows_with_unit_tests_are_detected(row: dict[str, Any], format_name: str, question: str, answer: str) -> None:
    assert detect_format(row) == format_name
    conversation = to_conversation(row, format_name, {})
    assert question in conversation.messages[0].content and "double(3)" not in conversation.messages[0].content
    assert conversation.answer == answer and conversation.ground_truth is None


def test_mapped_columns_take_precedence_over_unit_tests() -> None:
    assert detect_format(MBPP, {"question": "text", "answer": "code"}) == "question_answer"
    with pytest.raises(InvalidRow, match="`test_list` is not a list"):
        to_conversation({**MBPP, "test_list": "assert f()"}, "mbpp", {})
