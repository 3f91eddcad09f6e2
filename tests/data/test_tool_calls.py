"""Tool calls, tool results and tools of rows: every shape becomes the same messages, and every fault has a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import SHARED

from lowrank_tune.config import SourceConfig
from lowrank_tune.data import InvalidRow, detect_format, read_source, to_conversation, to_pair
from lowrank_tune.data.formats import Conversation, box_final_answer
from lowrank_tune.data.message import Message, ToolCall
from lowrank_tune.data.messages import calls_tool

CITY = {"name": "weather", "arguments": {"city": "Köln", "days": 2}}
ARGUMENTS = '{"city": "Köln", "days": 2}'
OPENAI_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": json.dumps({"city": "Köln", "days": 2})},
}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
ASK, REPLY = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Rain."}
HUMAN, GPT = {"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "Rain."}
RESULT = '{"sky": "grey"}'
CALL = ToolCall("weather", ARGUMENTS)
EXPECTED = (
    Message("user", "Weather?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", RESULT),
    Message("assistant", "Rain."),
)


def read(row: dict[str, Any], require_answer: bool = True) -> Conversation:
    return to_conversation(row, detect_format(row), {}, require_answer=require_answer)


def openai(call: Any, content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": call}


def sharegpt(call: str, result: str = "observation", value: Any = CITY) -> dict[str, Any]:
    return {"conversations": [HUMAN, {"from": call, "value": value}, {"from": result, "value": RESULT}, GPT]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, openai([CITY]), {"role": "tool", "content": RESULT}, REPLY]},
        {"messages": [ASK, openai([json.dumps(CITY)], ""), {"role": "tool", "content": {"sky": "grey"}}, REPLY]},
        {"messages": [ASK, openai(json.dumps([CITY]), []), {"role": "ipython", "content": RESULT}, REPLY]},
        {
            "messages": [
                ASK,
                openai([{"function": CITY}]),
                {"role": "tool", "content": [{"type": "text", "text": RESULT}]},
                REPLY,
            ]
        },
        {
            "messages": [
                ASK,
                {"role": "assistant", "function_call": CITY},
                {"role": "function", "content": RESULT},
                REPLY,
            ]
        },
        {
            "messages": [
                ASK,
                openai([{"name": "weather", "parameters": CITY["arguments"]}]),
                {"role": "tool", "content": RESULT},
                REPLY,
            ]
        },
        sharegpt("function_call"),
        sharegpt("tool_call", "tool_response", json.dumps(CITY)),
        sharegpt("function_call", "function_response", json.dumps([CITY], ensure_ascii=False)),
        sharegpt("function_call", "tool", [{"type": "function", "function": {**CITY, "arguments": ARGUMENTS}}]),
        {"prompt": [ASK], "completion": [openai([CITY]), {"role": "tool", "content": RESULT}, REPLY]},
        {"prompt": "Weather?", "completion": [openai([CITY]), {"role": "tool", "content": RESULT}, REPLY]},
    ],
)
def test_each_shape_of_a_call_becomes_the_same_messages(row: dict[str, Any]) -> None:
    assert read(row).messages == EXPECTED


def test_ids_and_names_are_kept() -> None:
    result = {"role": "tool", "content": RESULT, "name": "weather", "tool_call_id": "c1"}
    made = read({"messages": [ASK, openai([OPENAI_CALL], "I look."), result, REPLY]})
    assert made.messages[1] == Message("assistant", "I look.", tool_calls=(ToolCall("weather", ARGUMENTS, "c1"),))
    assert made.messages[2] == Message("tool", RESULT, name="weather", tool_call_id="c1")


def test_text_and_calls_in_a_row_are_one_message_and_results_stay_apart() -> None:
    other = {"name": "time", "arguments": {}}
    calls = [
        {"from": "gpt", "value": "I look."},
        {"from": "function_call", "value": CITY},
        {"from": "function_call", "value": other},
    ]
    results = [{"from": "observation", "value": "a"}, {"from": "observation", "value": ""}]
    made = read({"conversations": [HUMAN, *calls, *results, GPT]})
    assert [message.role for message in made.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert made.messages[1] == Message("assistant", "I look.", tool_calls=(CALL, ToolCall("time")))
    assert [message.content for message in made.messages[2:4]] == ["a", ""]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (None, ""),
        ("", ""),
        ("[]", ""),
        ("null", ""),
        ([], ""),
        ([TOOL], [TOOL]),
        (json.dumps([FUNCTION]), [TOOL]),
        ([json.dumps(FUNCTION)], [TOOL]),
        (FUNCTION, [TOOL]),
        ([{"function": FUNCTION}], [TOOL]),
        ([{**FUNCTION, "type": "function"}], [TOOL]),
        ([{**TOOL, "function": {**FUNCTION, "strict": None}}], [TOOL]),
    ],
)
def test_tools_are_read_in_the_form_of_openai(tools: Any, expected: Any) -> None:
    text = json.dumps(expected) if expected else ""
    assert read({"messages": [ASK, REPLY], "tools": tools}).tools == text
    assert to_pair({"prompt": "q", "chosen": "a", "rejected": "b", "tools": tools}, {}).tools == text


def test_tools_are_read_only_where_the_column_means_that() -> None:
    assert read({"messages": [ASK, REPLY], "functions": [FUNCTION]}).tools == json.dumps([TOOL])
    assert read({"question": "q", "answer": "a", "tools": "a hammer"}).tools == ""
    row = {"instruction": "q", "output": "a", "apis": json.dumps([FUNCTION])}
    assert to_conversation(row, "alpaca", {"tools": "apis"}).tools == json.dumps([TOOL])


def test_nulls_of_objects_are_dropped_and_those_of_texts_stay() -> None:
    union = {"name": "f", "arguments": {"a": None, "b": [None, {"c": None, "d": 1}]}}
    text = {"name": "f", "arguments": '{"a": null}'}
    made = read({"messages": [ASK, openai([union, text])]})
    assert [call.arguments for call in made.messages[1].tool_calls] == ['{"b": [null, {"d": 1}]}', '{"a": null}']
    row = {"messages": [{**ASK, "tool_calls": None, "function_call": None}, {**REPLY, "tool_calls": []}]}
    assert read(row).messages == (EXPECTED[0], EXPECTED[3])


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def called(call: Any) -> dict[str, Any]:
    return {"messages": [ASK, openai(call)]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (called("[{"), "invalid JSON in a tool call"),
        (called("7"), "the tool calls are not a list of objects"),
        (called([7]), "a tool call is not an object"),
        (called([{"function": "weather"}]), "the function of a tool call is not an object"),
        (called([{"arguments": {}}]), "a tool call without a name"),
        (called([{"name": " "}]), "a tool call without a name"),
        (called([{"name": ["weather"]}]), "the name of a tool call is not text"),
        (called([{"name": "f", "arguments": "{a: 1}"}]), "invalid JSON in the arguments of a tool call"),
        (called([{"name": "f", "arguments": "[1]"}]), "the arguments of a tool call are not an object"),
        (called([{"name": "f", "arguments": [1]}]), "the arguments of a tool call are not an object"),
        (called([{"name": "f", "arguments": '{"a": NaN}'}]), "JSON does not have in the arguments"),
        (called([{"name": "f", "arguments": {"a": float("inf")}}]), "JSON does not have in the arguments"),
        (called([{"name": "f", "arguments": {"a": b"x"}}]), "JSON does not have in the arguments"),
        (called([{"name": "f", "arguments": {"a": 10**5000}}]), "JSON does not have in the arguments"),
        (called([{"name": "f", "arguments": '{"a": 1' + "0" * 5000 + "}"}]), "a number without limit in the arguments"),
        (called([{"name": "f", "arguments": '{"a": ' * 60 + "1" + "}" * 60}]), "more than 50 levels of nesting"),
        (called([{"name": "f", "arguments": '{"a": ' * 9999 + "1" + "}" * 9999}]), "nesting or a number without limit"),
        (called([{"name": "f", "arguments": deep(60)}]), "more than 50 levels of nesting in the arguments"),
        (called([{"name": "f", "arguments": {"a": "\ud800"}}]), "a lone surrogate, which UTF-8 cannot encode"),
        (called([{"name": "f", "arguments": '{"a": "\\ud800"}'}]), "a lone surrogate, which UTF-8 cannot encode"),
        (called([{"name": "\ud800"}]), "a lone surrogate, which UTF-8 cannot encode"),
        (called([{"name": "f", "id": {"a": 1}}]), "the id of a tool call is not text"),
        ({"messages": [{**ASK, "tool_calls": [CITY]}, REPLY]}, "tool calls in a turn that is not the assistant's"),
        ({"messages": [ASK, openai([])]}, "a turn has no content"),
        ({"messages": [ASK, openai([CITY]), REPLY]}, "a tool call without its result"),
        ({"messages": [ASK, openai([CITY]), ASK, REPLY]}, "a tool call without its result"),
        (
            {"messages": [ASK, REPLY, {"role": "tool", "content": "x"}, REPLY]},
            "a tool result without a tool call before it",
        ),
        ({"messages": [{"role": "tool", "content": "x"}, REPLY]}, "a tool result without a tool call before it"),
        (
            {"messages": [ASK, openai([CITY]), {"role": "tool", "content": "x"}]},
            "no answer: the last turn is a tool result",
        ),
        (
            {"messages": [ASK, openai([CITY]), {"role": "tool", "content": {"a": float("nan")}}, REPLY]},
            "in a tool result",
        ),
        ({"messages": [ASK, openai([CITY]), {"role": "tool", "content": deep(60)}, REPLY]}, "nesting in a tool result"),
        (
            {"messages": [ASK, openai([CITY]), {"role": "tool", "content": "x", "name": [1]}, REPLY]},
            "the name of a tool is not",
        ),
        ({"messages": [ASK, openai([CITY], "I look."), openai([CITY], "Again.")]}, "a tool call without its result"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": None}]}, "a turn has no content"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "[]"}]}, "a turn of a tool call has no call"),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "weather(Köln)"}]},
            "invalid JSON in a tool call",
        ),
        ({"conversations": [HUMAN, {"from": "function_call", "value": CITY}, GPT]}, "a tool call without its result"),
        ({"messages": [ASK, REPLY], "tools": "[{"}, "invalid JSON in `tools`"),
        ({"messages": [ASK, REPLY], "tools": 7}, "`tools` is not a list of functions"),
        ({"messages": [ASK, REPLY], "tools": [["weather"]]}, "a tool in `tools` is not an object"),
        ({"messages": [ASK, REPLY], "tools": ["weather"]}, "invalid JSON in `tools`"),
        ({"messages": [ASK, REPLY], "tools": [{"type": "web_search"}]}, "a tool in `tools` is not a function"),
        ({"messages": [ASK, REPLY], "tools": [{"description": "x"}]}, "a tool without a name"),
        (
            {"messages": [ASK, REPLY], "tools": [{"type": "function", "function": "f"}]},
            "function of a tool in `tools` is not",
        ),
        ({"messages": [ASK, REPLY], "tools": [{"name": 3}]}, "the name of a tool is not text"),
        (
            {"messages": [ASK, REPLY], "tools": [{**FUNCTION, "parameters": deep(60)}]},
            "more than 50 levels of nesting in `tools`",
        ),
        ({"messages": [ASK, REPLY], "tools": [{**FUNCTION, "default": float("nan")}]}, "JSON does not have in `tools`"),
        ({"messages": [ASK, REPLY], "tools": [{**FUNCTION, "description": "\udfff"}]}, "a lone surrogate"),
    ],
)
def test_a_faulty_call_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        read(row)


def test_a_row_may_end_with_a_call_or_for_a_prompt_with_a_result() -> None:
    row = {"messages": [ASK, openai([CITY])], "final_answer": "42"}
    made = read(row)
    assert made.answer == "" and made.prompt == EXPECTED[:1] and made.ground_truth == "42"
    assert to_conversation(row, "messages", {}, "answer").ground_truth is None
    ended = {"messages": [ASK, openai([CITY]), {"role": "tool", "content": RESULT}], "tools": [FUNCTION]}
    prompt = read(ended, require_answer=False)
    assert prompt.answer is None and prompt.prompt == EXPECTED[:3] and prompt.tools == json.dumps([TOOL])


def test_a_boxed_answer_keeps_its_reasoning_and_calls() -> None:
    last = {**openai([CITY], "So.\n#### 4"), "reasoning_content": "Hm."}
    boxed = box_final_answer(read({"messages": [ASK, last], "tools": [FUNCTION]}))
    assert boxed.messages[-1] == Message("assistant", "So.\nThe answer is $\\boxed{4}$.", "Hm.", (CALL,))
    assert boxed.tools == json.dumps([TOOL])


def test_a_call_that_is_written_into_an_answer_stays_text() -> None:
    """Rows of Hermes: the system prompt describes the form of a call, and the answer contains it."""
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    row = {"conversations": [HUMAN, {"from": "gpt", "value": call}, {"from": "tool", "value": "grey"}, GPT]}
    made = read(row)
    assert made.messages[1] == Message("assistant", call) and made.messages[2] == Message("tool", "grey")
    assert calls_tool(made.messages[1]) and not calls_tool(Message("user", call))


def test_a_pair_may_differ_in_its_calls_alone() -> None:
    other = {**CITY, "name": "time"}
    made = to_pair({"chosen": [ASK, openai([CITY])], "rejected": [ASK, openai([other])], "tools": [TOOL]}, {})
    assert made.prompt == EXPECTED[:1] and made.chosen == (EXPECTED[1],)
    assert made.rejected[0].tool_calls == (ToolCall("time", ARGUMENTS),)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=100)
@given(arguments=st.dictionaries(st.text(max_size=4), json_values, max_size=4), result=json_values)
def test_arguments_and_results_keep_their_values(arguments: dict[str, Any], result: Any) -> None:
    call = [{"name": "<|im_end|>", "arguments": json.dumps(arguments)}]
    made = read({"messages": [ASK, openai(call), {"role": "tool", "content": json.dumps(result)}, REPLY]})
    assert json.loads(made.messages[1].tool_calls[0].arguments) == arguments
    assert list(json.loads(made.messages[1].tool_calls[0].arguments)) == list(arguments)
    assert made.messages[2].content == json.dumps(result)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**600), 10**600)
    | st.floats()
    | st.text(max_size=4)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "arguments", "function", "id", "type", "parameters", "content"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "function_call", "observation"])},
    optional={
        "content": st.text("ab<", max_size=3) | anything,
        "tool_calls": st.lists(st.fixed_dictionaries({"name": st.just("f")}, optional={"arguments": anything}))
        | anything,
        "function_call": anything,
        "thinking": st.text(max_size=3) | anything,
        "name": anything,
    },
)


@settings(max_examples=300)
@given(turns=st.lists(turn, max_size=5), tools=anything | st.lists(st.fixed_dictionaries({"name": st.just("f")})))
def test_random_turns_become_conversations_or_reasons(turns: list[Any], tools: Any) -> None:
    try:
        made = to_conversation({"messages": [ASK, *turns], "tools": tools}, "messages", {}, require_answer=False)
    except InvalidRow as fault:
        assert len(fault.reason) < 120
        return
    assert isinstance(json.loads(made.tools or "[]"), list)
    for before, message in zip(made.messages, made.messages[1:], strict=False):
        "".join(message.texts()).encode()
        assert message.role != "tool" or before.role == "tool" or calls_tool(before)
        assert not before.tool_calls or message.role == "tool"
        assert all(isinstance(json.loads(call.arguments), dict) for call in message.tool_calls)


def test_every_row_of_glaive_is_a_conversation() -> None:
    """153 of its 300 rows call tools, 211 times; 109 have an empty list of tools."""
    path = SHARED / "data" / "llamafactory_demos" / "glaive_toolcall_en_demo.json.gz"
    if not path.exists():
        pytest.skip("needs ../shared")
    made = [to_conversation(raw, "sharegpt", {}) for _, raw in read_source(SourceConfig(dataset=str(path)), 0)]
    calls = [[call for message in each.messages for call in message.tool_calls] for each in made]
    assert len(made) == 300 and sum(map(bool, calls)) == 153 and sum(map(len, calls)) == 211
    assert sum(not each.tools for each in made) == 109
    for each, own in zip(made, calls, strict=True):
        defined = {tool["function"]["name"] for tool in json.loads(each.tools or "[]")}
        assert {call.name for call in own} <= defined
        assert sum(message.role == "tool" for message in each.messages) == len(own)
