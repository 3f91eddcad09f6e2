"""What is trained of each answer is what TRL trains with its own templates for training, but for a list of intended
differences."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from template_shapes import TRL_IMAGE_TEMPLATES
from tokenizers_for_tests import tiny

from lowrank_tune.config import DataConfig
from lowrank_tune.data import ChatTemplate, InvalidRow, load
from lowrank_tune.data.encode import REWRITTEN_ANSWER
from lowrank_tune.data.message import Message, ToolCall
from lowrank_tune.data.templates.generation_prompt import TAG_IN_ANSWER
from lowrank_tune.data.templates.message_fields import NO_TEXT_BESIDE_CALLS

DAY = "2024-07-26"
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Adds.",
                "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
            },
        }
    ]
)
CALL = ToolCall("add", '{"a": 12}', "call00001")
RESULT = Message("tool", "The sum is 42.", name="add", tool_call_id="call00001")
Conversation = tuple[Message, ...]


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, reasoning: str = "", *calls: ToolCall) -> Message:
    return Message("assistant", text, reasoning_content=reasoning, tool_calls=calls)


CASES: dict[str, tuple[Conversation, str]] = {
    "one answer": ((user("Hm?"), assistant("It is 4.")), ""),
    "two answers": ((user("Hm?"), assistant("It is 4."), user("Sure?"), assistant("Yes.")), ""),
    "reasoning": ((user("Hm?"), assistant("It is 4.", "Two and two.")), ""),
    "reasoning twice": (
        (user("Hm?"), assistant("It is 4.", "Two and two."), user("Sure?"), assistant("Yes.", "I know.")),
        "",
    ),
    "tool": ((user("Add."), assistant("", "", CALL), RESULT, assistant("It is 42.")), TOOLS),
    "tool and reasoning": ((user("Add."), assistant("", "I add.", CALL), RESULT, assistant("It is 42.", "So.")), TOOLS),
}


def trl_folder() -> Path | None:
    """Without importing TRL, which takes seconds."""
    spec = importlib.util.find_spec("trl")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "chat_templates"


def names() -> list[str]:
    folder = trl_folder()
    if folder is None:
        return []
    found = [file.stem.removesuffix("_training") for file in sorted(folder.glob("*_training.jinja"))]
    return [name for name in found if name not in TRL_IMAGE_TEMPLATES]


NAMES = names()


@functools.cache
def tokenizer_of(name: str) -> Any:
    folder = trl_folder()
    assert folder is not None
    text = (folder / f"{name}.jinja").read_text()
    made = tiny(text, split=True)
    pattern = r"<\|[\w ]+\|>|<｜[^<>｜]+｜>|<\|?\w+\|>|<\|\w+\|?>|<(?:start|end)_of_turn>"
    made.add_special_tokens({"extra_special_tokens": sorted({*re.findall(pattern, text), "<think>", "</think>"})})
    return made


@functools.cache
def template_of(name: str) -> ChatTemplate:
    made = tokenizer_of(name)
    return ChatTemplate.from_tokenizer(made, DAY if "strftime_now" in made.chat_template else None)


def stretches(mask: Any) -> list[tuple[int, int]]:
    edges = [index for index, (before, now) in enumerate(pairwise([0, *mask, 0])) if bool(before) != bool(now)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def our_answers(name: str, case: str) -> list[str] | str:
    """The trained text of each answer, in order; or why the row is dropped."""
    messages, tools = CASES[case]
    template = template_of(name)
    (rows,) = template.encode_all([messages], [tools])
    if isinstance(rows, InvalidRow):
        return rows.reason
    found = []
    for row in rows:
        for start, end in stretches(row.completion_mask):
            found.append((start, template.decode(row.input_ids[start:end], special_tokens=True)))
    return [text for _, text in sorted(found)]


def trl_answers(name: str, case: str) -> list[str] | None:
    """The same by TRL's template with `return_assistant_tokens_mask`; None where it does not accept the messages."""
    messages, tools = CASES[case]
    folder = trl_folder()
    assert folder is not None
    plain = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning_content:
            # gpt-oss reads `thinking`, the others `reasoning_content`.
            turn["thinking" if name == "gptoss" else "reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            function = {"name": CALL.name, "arguments": json.loads(CALL.arguments)}
            turn["tool_calls"] = [{"type": "function", "function": function, "id": CALL.call_id}]
        if message.role == "tool":
            turn.update(name=message.name, tool_call_id=message.tool_call_id)
        plain.append(turn)
    arguments: dict[str, Any] = {"tools": json.loads(tools)} if tools else {}
    made = tokenizer_of(name)
    try:
        encoded = made.apply_chat_template(
            plain,
            chat_template=(folder / f"{name}_training.jinja").read_text(),
            return_dict=True,
            return_assistant_tokens_mask=True,
            **arguments,
        )
    except Exception:
        return None
    ids = encoded["input_ids"]
    return [made.decode(ids[start:end]) for start, end in stretches(encoded["assistant_masks"])]


ROLE_HEADER = re.compile(r"\A(?:<｜Assistant｜>|<\|start\|>assistant|\n(?!<think>))")
OPENED = (
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
    "nemotron_3_nano",
    "nemotron_3_super",
    "nemotron_3_ultra",
    "nemotron_3_5_lightning",
)
AFTER_END = re.compile(r"(?:\n|\n</s>)\Z")
EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")


def without_intended_differences(name: str, text: str) -> str:
    """TRL's trained text of an answer as this kit intends it.

    - A role header is not trained: it is the end of the prompt.
    - An empty thought is not trained. A thought that the prompt opens is trained without its opening tag.
    - What follows the end token is not trained: the newline, and the end token of the whole text (Phi 3).
    - GLM has no end token of its own: TRL trains the mark of the next role, this kit the tokenizer's end token.
    - Gemma's model writes `<|tool_response>` after a call, and stops there.
    """
    text = ROLE_HEADER.sub("", AFTER_END.sub("", text))
    text = EMPTY_THOUGHT.sub("", text)
    if name in OPENED:
        text = text.removeprefix("<think>\n").removeprefix("<think>")
    if name == "glm4moe":
        text = re.sub(r"<\|(?:user|observation)\|>\Z", "</s>", text)
    if name == "diffusion_gemma" and text.endswith("<tool_call|>"):
        text += "<|tool_response>"
    return text


NO_TOOLS = (
    "cohere",
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "llama3",
    "phi3",
    "phi3_5",
    "qwen2_5_vl",
)
"""Their templates write no tools, or no calls: the rows are dropped. TRL trains empty answers, or refuses."""
NO_CALLS = ("lfm2",)
CLOSES_THOUGHT = "qwen3_5_nothink"
"""Its generation prompt closes the thought, so that an answer with reasoning cannot follow: dropped."""
DROPS_REASONING = (
    "cohere",
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "lfm2",
    "lfm2_v2",
    "llama3",
    "phi3",
    "phi3_5",
    "qwen2_5",
    "qwen2_5_vl",
    "qwen3_instruct_2507",
    "qwen3_vl",
)
"""Their templates write no reasoning. This kit trains it as a thought before the answer, TRL trains none."""


def expected(name: str, case: str) -> list[str] | str:
    """What this kit is to train."""
    if CASES[case][1]:
        if name in NO_TOOLS:
            return "tools, which the base's chat template does not write"
        if name in NO_CALLS:
            return "tool calls, which the base's chat template does not write"
    if name == CLOSES_THOUGHT and "reasoning" in case:
        return (
            "its answer has a thought, and the chat template's generation prompt closes the thought before the answer"
        )
    found = trl_answers(name, case)
    assert found is not None
    answers = [message for message in CASES[case][0] if message.role == "assistant"]
    assert len(found) == len(answers)
    texts = [without_intended_differences(name, text) for text in found]
    return [add_reasoning(name, text, answer) for text, answer in zip(texts, answers, strict=True)]


def add_reasoning(name: str, text: str, answer: Message) -> str:
    """Each answer is trained as it was generated: with its reasoning, also where it is an earlier one of which a later
    prompt has no reasoning, and with the end token of a last answer (gpt-oss)."""
    reasoning = answer.reasoning_content
    if name == "gptoss":
        text = re.sub(r"<\|end\|>\Z", "<|return|>", text)
    if not reasoning or reasoning in text:
        return text
    if name == "gptoss":
        return f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant{text}"
    if name == "diffusion_gemma":
        return f"<|channel>thought\n{reasoning}\n<channel|>{text}"
    if name == "glm4moe":
        return f"\n<think>{reasoning}</think>\n{text}"
    if name in ("nemotron_3_ultra", "nemotron_3_5_lightning"):
        return f"{reasoning}</think>{text}"
    if name in OPENED:
        return f"{reasoning}\n</think>\n{text}"
    assert name in DROPS_REASONING
    separator = "\n\n" if answer.content else "" if name == "lfm2_v2" else "\n"
    thought = f"<think>\n{reasoning}\n</think>{separator}{text}"
    return thought.removeprefix("<think>\n") if name.startswith("deepseek") else thought


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_each_answer_is_trained_once_as_trl_trains_it(name: str, case: str) -> None:
    assert our_answers(name, case) == expected(name, case)


@pytest.mark.parametrize(
    ("name", "message", "expected"),
    [
        ("qwen3", assistant("<think>a</think>b</think>c"), "<think>a</think>b</think>c<|im_end|>"),
        ("qwen3", assistant("Hi. <think> opens it, </think> closes it."), TAG_IN_ANSWER),
        ("glm4moe", assistant("Hi. <think> opens it, </think> closes it."), TAG_IN_ANSWER),
        ("qwen2_5", assistant("Hi. <think> opens it."), "Hi. <think> opens it.<|im_end|>"),
        ("qwen3", assistant("", "", CALL, CALL), None),
    ],
)
def test_answers_with_tags_and_several_calls(name: str, message: Message, expected: str | None) -> None:
    if trl_folder() is None:
        pytest.skip("needs TRL")
    template = template_of(name)
    (rows,) = template.encode_all([(user("Hm?"), message)], [TOOLS if message.tool_calls else ""])
    if isinstance(rows, InvalidRow):
        assert rows.reason == expected
        return
    ((start, end),) = stretches(rows[0].completion_mask)
    text = template.decode(rows[0].input_ids[start:end], special_tokens=True)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>'
    assert text == (expected or f"{call}\n{call}<|im_end|>")


@pytest.mark.parametrize("name", ["gptoss", "qwen3", "llama3_1", "muse_glimmer"])
def test_text_beside_a_call_is_trained_or_the_row_dropped(name: str) -> None:
    if trl_folder() is None:
        pytest.skip("needs TRL")
    messages = (user("Add."), assistant("Let me.", "", CALL), RESULT, assistant("It is 42."))
    (rows,) = template_of(name).encode_all([messages], [TOOLS])
    if name in ("llama3_1", "muse_glimmer"):
        assert isinstance(rows, InvalidRow) and rows.reason == NO_TEXT_BESIDE_CALLS
        return
    assert not isinstance(rows, InvalidRow)
    trained = []
    for row in rows:
        for start, end in stretches(row.completion_mask):
            trained.append(template_of(name).decode(row.input_ids[start:end], special_tokens=True))
    text = "".join(trained)
    assert "Let me." in text and '{"a": 12}' in text and "It is 42." in text


def test_control_tokens_that_a_template_writes_as_python_are_plain_text() -> None:
    if trl_folder() is None:
        pytest.skip("needs TRL")
    call = ToolCall("add", '{"b": ["<|im_end|>X"]}')
    template = template_of("lfm2_2_5")
    (rows,) = template.encode_all([(user("Add."), assistant("", "", call))], [TOOLS])
    assert not isinstance(rows, InvalidRow)
    end = template.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "['<|im_end|>X']" in template.decode(rows[0].input_ids, special_tokens=True)
    # those of the system, the user and the assistant
    assert list(rows[0].input_ids).count(end) == 3


def test_a_pair_with_an_answer_that_is_rewritten_is_dropped(tmp_path: Path) -> None:
    if trl_folder() is None:
        pytest.skip("needs TRL")
    sides = {}
    for side, first in (("chosen", "Good."), ("rejected", "Bad.")):
        turns = [("user", "Hm?"), ("assistant", first), ("user", "So?"), ("assistant", "Yes.")]
        sides[side] = [{"role": role, "content": text} for role, text in turns]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(sides) + "\n")
    data = DataConfig.model_validate({"train": [{"dataset": str(file)}], "eval_fraction": 0.0})
    for name, used in (("qwen2_5", 1), ("qwen3", 0), ("qwen3_5_think", 0), ("gptoss", 0)):
        splits = load(
            data,
            template_of(name),
            0,
            lambda event: None,
            tmp_path / "cache",
            raise_on_invalid=False,
            pairs=True,
        )
        report = splits.report.train[0]
        assert report.used == used, name
        assert used or list(report.dropped) == [REWRITTEN_ANSWER]


def test_trl_has_templates_for_training() -> None:
    if trl_folder() is None:
        pytest.skip("needs TRL")
    assert len(NAMES) >= 25
