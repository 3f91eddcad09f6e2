"""Reasoning, tool calls and variables of chat templates: what is rendered, what is trained, and rows that try to write
control tokens."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, MARKS, SHARED, tiny

from lowrank_tune.batch import Row
from lowrank_tune.cli.common import parse_template_variables
from lowrank_tune.config import DataConfig
from lowrank_tune.data import ChatTemplate, InvalidRow, load, to_conversation
from lowrank_tune.data.message import Message, ToolCall
from lowrank_tune.data.store_writer import conversation_hash
from lowrank_tune.data.templates.message_fields import NO_CALLS, NO_TOOLS
from lowrank_tune.errors import UserError

HERMES = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and (loop.last or m.reasoning_content) and enable_thinking is not false %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% elif m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3 in short: reasoning, tools, and a variable."""
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
TOOLS = json.dumps([TOOL])
CALL = ToolCall("add", '{"a": 12}', "call00001")
LOOP = (
    Message("user", "Add."),
    Message("assistant", "", reasoning_content="I add.", tool_calls=(CALL,)),
    Message("tool", "42", name="add", tool_call_id="call00001"),
    Message("assistant", "It is 42."),
)
CONTROL = {*MARKS, "<|user|>", "<|assistant|>", "<|end_of_text|>"}
KIT_AND_WORDS = {"kit": tiny(), "words": tiny(marks=False)}


def hermes(**kwargs: Any) -> ChatTemplate:
    return ChatTemplate.from_tokenizer(tiny(HERMES), kwargs=kwargs)


def texts(template: ChatTemplate, messages: tuple[Message, ...], tools: str = "") -> list[tuple[str, str]]:
    """Of each row the whole text, and what is trained of it."""
    (rows,) = template.encode_all([messages], [tools])
    assert not isinstance(rows, InvalidRow), rows.reason
    return [(template.decode(row.input_ids, True), trained_text(template, row)) for row in rows]


def trained_text(template: ChatTemplate, row: Row) -> str:
    pairs = zip(row.input_ids, row.completion_mask, strict=True)
    return template.decode([token for token, is_trained in pairs if is_trained], special_tokens=True)


def test_a_loop_of_tools_is_trained_without_results() -> None:
    ((text, trained),) = texts(hermes(), LOOP, TOOLS)
    assert trained == (
        '<think>\nI add.\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 12}}</tool_call><|im_end|>'
        "It is 42.<|im_end|>"
    )
    assert "Adds." in text and "<tool_response>42</tool_response>" in text


def test_an_empty_thought_is_context() -> None:
    ((text, trained),) = texts(hermes(), (Message("user", "Hm?"), Message("assistant", "Yes.")))
    assert trained == "Yes.<|im_end|>"
    assert text.endswith("<think>\n\n</think>\n\nYes.<|im_end|>\n")


def test_variables_are_in_prompts_rows_and_the_exported_template() -> None:
    thinking, not_thinking = hermes(), hermes(enable_thinking=False)
    question = [Message("user", "Hm?")]
    assert not_thinking.decode(not_thinking.prompt(question), True).endswith("<think>\n\n</think>\n\n")
    assert thinking.decode(thinking.prompt(question), True).endswith("assistant\n")
    assert thinking.fingerprint != not_thinking.fingerprint
    assert "enable_thinking: false" in not_thinking.describe()
    made = tiny(not_thinking.chat_template)
    exported = made.apply_chat_template([{"role": "user", "content": "Hm?"}], add_generation_prompt=True)["input_ids"]
    assert exported == not_thinking.prompt(question)
    requested = made.apply_chat_template(
        [{"role": "user", "content": "Hm?"}], add_generation_prompt=True, enable_thinking=True
    )["input_ids"]
    assert requested == thinking.prompt(question), "an argument replaces the default"


def test_reasoning_cannot_follow_a_prompt_without_thinking() -> None:
    messages = (Message("user", "Hm?"), Message("assistant", "Yes.", reasoning_content="Perhaps."))
    (rows,) = hermes(enable_thinking=False).encode_all([messages])
    assert isinstance(rows, InvalidRow) and "closes the thought" in rows.reason


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_variable_that_the_template_does_not_use_is_an_error(template: str | None) -> None:
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs: .*`enable_thinking`"):
        ChatTemplate.from_tokenizer(tiny(template), kwargs={"enable_thinking": False})


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [(LOOP, "", NO_CALLS), (LOOP, TOOLS, NO_TOOLS), (LOOP[:1] + LOOP[3:], TOOLS, NO_TOOLS)],
)
def test_a_template_without_tools_drops_the_row(messages: tuple[Message, ...], tools: str, reason: str) -> None:
    template = ChatTemplate.from_tokenizer(tiny(CHATML))
    (rows,) = template.encode_all([messages], [tools])
    assert isinstance(rows, InvalidRow) and rows.reason == reason
    (prompt,) = template.prompt_many([messages[:-1]], [tools])
    assert isinstance(prompt, InvalidRow)
    assert template.validate_messages(messages, tools) == reason


@pytest.mark.parametrize("name", KIT_AND_WORDS)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("tools", ["", TOOLS])
def test_the_kits_own_templates_write_tools_as_their_exported_form_does(name: str, system: bool, tools: str) -> None:
    made = KIT_AND_WORDS[name]
    template = ChatTemplate.from_tokenizer(made)
    messages = (Message("system", "Be brief."), *LOOP) if system else LOOP
    ((text, trained),) = texts(template, messages, tools)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>' in trained
    assert "I add." in trained and "It is 42." in trained and "Adds." not in trained
    assert ("Adds." in text) == bool(tools)
    arguments: dict[str, Any] = {"tools": json.loads(tools)} if tools else {}
    plain: list[dict[str, Any]] = [{"role": message.role, "content": message.content} for message in messages]
    plain[-3] |= {
        "reasoning_content": "I add.",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 12}}}],
    }
    exported = made.apply_chat_template(plain, chat_template=template.chat_template, tokenize=False, **arguments)
    assert exported == text.removesuffix("<|end_of_text|>")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from([*sorted(CONTROL), "</think>", "<think>", "é", '"\\', "{}"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*sorted(CONTROL), "a"]), inner, max_size=2)
    ),
    max_leaves=6,
)
HOSTILE = st.lists(st.sampled_from([*sorted(CONTROL), "a", " ", "</tool_call>", "\n"]), min_size=1, max_size=5).map(
    "".join
)
"""Texts of control tokens."""


@pytest.mark.parametrize("template", [hermes(), *map(ChatTemplate.from_tokenizer, KIT_AND_WORDS.values())])
@settings(max_examples=20)
@given(text=HOSTILE, arguments=st.dictionaries(HOSTILE, VALUES, max_size=2))
def test_control_tokens_in_reasoning_calls_results_and_tools_are_plain_text(
    template: ChatTemplate, text: str, arguments: dict[str, Any]
) -> None:
    tool = {**TOOL, "function": {**TOOL["function"], "description": text}}  # type: ignore[dict-item]
    call = ToolCall(text, json.dumps(arguments), text)

    def conversation(value: str, made: ToolCall) -> tuple[Message, ...]:
        return (
            Message("user", value),
            Message("assistant", value, reasoning_content=value, tool_calls=(made,)),
            Message("tool", value, name=value, tool_call_id=value),
            Message("assistant", f"{value}."),
        )

    (harmless,) = template.encode_all([conversation("a", CALL)], [TOOLS])
    (rows,) = template.encode_all([conversation(text, call)], [json.dumps([tool])])
    assert not isinstance(harmless, InvalidRow)
    if isinstance(rows, InvalidRow):
        assert "control token" in rows.reason or "marker" in rows.reason
        return
    special = {template.tokenizer.convert_tokens_to_ids(token) for token in CONTROL}

    def control_ids(row: Row) -> list[int]:
        return [int(token) for token in row.input_ids if int(token) in special]

    assert control_ids(rows[0]) == control_ids(harmless[0])


def test_each_row_of_a_conversation_is_in_the_store(tmp_path: Path) -> None:
    rewriting = HERMES.replace("(loop.last or m.reasoning_content)", "loop.last")
    template = ChatTemplate.from_tokenizer(tiny(rewriting))
    turns = [("user", "One?", ""), ("assistant", "1.", "Hm."), ("user", "Two?", ""), ("assistant", "2.", "So.")]
    row = [{"role": role, "content": text, "reasoning_content": reasoning} for role, text, reasoning in turns]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row[:end]}) + "\n" for end in (2, 4)))
    data = DataConfig.model_validate({"train": [{"dataset": str(file)}], "eval_fraction": 0.0})
    store = load(data, template, 0, lambda event: None, cache=tmp_path / "cache").train
    assert store.units == 2 and len(store) == 3
    trained = Counter(trained_text(template, store[index]) for index in range(len(store)))
    first, second = "<think>\nHm.\n</think>\n\n1.<|im_end|>", "<think>\nSo.\n</think>\n\n2.<|im_end|>"
    assert trained == {first: 2, second: 1}


def test_a_conversation_is_on_one_side_of_the_split_whatever_the_number_of_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = []
    for number in range(30):
        contents = [f"{text} {number}" for text in ("One?", "1.", "Two?", "2.")]
        rows.append(
            [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
        )
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = DataConfig.model_validate({"train": [{"dataset": str(file)}], "eval_rows": 8})
    held_out = set()
    for template in (hermes(), ChatTemplate.from_tokenizer(tiny(CHATML))):
        splits = load(data, template, 0, lambda event: None, cache=tmp_path / "cache")
        assert splits.validation is not None
        held_out.add(frozenset(splits.validation.row_location(row) for row in range(len(splits.validation))))
    assert len(held_out) == 1


@pytest.mark.parametrize("blank", ["", " ", "\n\n", None])
def test_blank_reasoning_is_none(blank: str | None) -> None:
    turns = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes.", "reasoning_content": blank}]
    conversation = to_conversation({"messages": turns}, "messages", {})
    assert conversation.messages[1] == Message("assistant", "Yes.")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{x}", "expected a JSON object"),
        ('{"messages": 1}', "`messages` is set by the kit"),
        ('{"eos_token": "x"}', "`eos_token` is set by the kit"),
        ('{"date_string": "x"}', "write `data.template_date`"),
        ('{"true": 1}', "`true` is not the name of a variable"),
        ('{"x": NaN}', "`x` is not a finite number"),
        ('{"x": "\\ud83d"}', "lone surrogate"),
    ],
)
def test_a_variable_that_cannot_be_set_is_an_error(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=re.escape(fault)):
        parse_template_variables(text)


@pytest.mark.parametrize("value", [True, 3, 1.5, "a 'b' \"c\" \n %} {{ x }} é \U0001f600"])
def test_values_of_variables_are_written_as_they_are(value: Any) -> None:
    template = ChatTemplate.from_tokenizer(tiny("{{ level }}|" + CHATML), kwargs={"level": value})
    text = template.decode(template.prompt([Message("user", "Hm?")]), special_tokens=True)
    assert text.startswith(f"{value}|")


def test_all_rows_of_glaive_are_trained() -> None:
    path = SHARED / "data" / "llamafactory_demos" / "glaive_toolcall_en_demo.json.gz"
    if not path.is_file():
        pytest.skip("needs ../shared")
    raw = json.loads(gzip.decompress(path.read_bytes()))
    conversations = [to_conversation(row, "sharegpt", {}) for row in raw]
    rows = hermes().encode_all(
        [conversation.messages for conversation in conversations],
        [conversation.tools for conversation in conversations],
    )
    assert [row.reason for row in rows if isinstance(row, InvalidRow)] == []
    num_calls = 0
    for conversation, encoded in zip(conversations, rows, strict=True):
        assert not isinstance(encoded, InvalidRow)
        trained = "".join(trained_text(hermes(), row) for row in encoded)
        for message in conversation.messages:
            num_calls += len(message.tool_calls)
            if message.role == "tool":
                assert f"<tool_response>{message.content}" not in trained
        assert trained.count("<|im_end|>") == sum(message.role == "assistant" for message in conversation.messages)
    assert len(rows) == 300 and num_calls > 150


def test_tools_and_reasoning_change_the_hash() -> None:
    plain = (Message("user", "Hm?"), Message("assistant", "Yes."))
    variants = [
        conversation_hash(plain),
        conversation_hash(plain, TOOLS),
        conversation_hash((plain[0], replace(plain[1], reasoning_content="So."))),
        conversation_hash((plain[0], replace(plain[1], tool_calls=(CALL,)))),
    ]
    assert len(set(variants)) == len(variants)
