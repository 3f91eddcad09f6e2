"""Chat templates: training and sampling use the prompt that `apply_chat_template` renders, and an answer is trained
only after its own prompt."""

from __future__ import annotations

import functools
import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stopped_clock import stop_clock
from template_shapes import REFUSED, SHAPES, TRL_IMAGE_TEMPLATES
from tokenizers import processors
from tokenizers_for_tests import CHATML, tiny

from lowrank_tune.batch import Row
from lowrank_tune.data import ChatTemplate, InvalidRow
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError

DAY = "2024-07-26"
"""The date that Llama 3.1's template writes by default."""
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"
ANSWERS = {"plain": ("It is 4.", "Yes."), "thoughts": (f"{THOUGHT}It is 4.", f"{THOUGHT}Yes.")}


def trl_templates() -> dict[str, str]:
    """TRL's original templates, where TRL is installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text() for file in files if not file.stem.endswith("_training")}


TEMPLATES = {**SHAPES, **{f"trl/{name}": text for name, text in trl_templates().items()}}
TEXT_TEMPLATES = [name for name in TEMPLATES if name.removeprefix("trl/") not in TRL_IMAGE_TEMPLATES]


@functools.cache
def made(name: str, marks: str) -> Any:
    """A tokenizer with a template, whose control tokens are foreign to it (`foreign`), or special tokens, the tags of
    thoughts among them (`special`)."""
    text = TEMPLATES[name]
    one = tiny(text, split=True)
    found = set(re.findall(r"<\|[\w ]+\|>|<｜[^<>｜]+｜>|<\|?\w+\|>|<\|\w+\|?>|<(?:start|end)_of_turn>", text))
    if marks == "special":
        one.add_special_tokens({"extra_special_tokens": sorted(found | {"<think>", "</think>"})})
    return one


@functools.cache
def template_of(name: str, marks: str) -> ChatTemplate:
    dated = "strftime_now" in TEMPLATES[name]
    return ChatTemplate.from_tokenizer(made(name, marks), DAY if dated else None)


OWN_TAGS = {
    "trl/gptoss": "thinking",
    "trl/muse_glimmer": "reasoning_content",
    "trl/diffusion_gemma": "reasoning",
    "trl/gemma4_v5": "reasoning",
}
"""The key of reasoning in templates that write it between other tags than those of a thought."""


def plain(messages: list[Message], reasoning_key: str | None = None) -> list[dict[str, str]]:
    found = []
    for message in messages:
        turn = {"role": message.role, "content": message.content}
        if reasoning_key and message.content.startswith(THOUGHT):
            turn = {**turn, "content": message.content.removeprefix(THOUGHT), reasoning_key: "Two and two."}
        found.append(turn)
    return found


def stock(name: str, marks: str, messages: list[Message]) -> list[int] | None:
    """The ids of transformers' own prompt; None where the template takes no such turns."""
    one = made(name, marks)
    try:
        return list(
            one.apply_chat_template(
                plain(messages, OWN_TAGS.get(name)), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except Exception:
        return None


def conversation(system: bool, exchanges: int, answers: tuple[str, str]) -> list[Message]:
    turns = [Message("system", "Be brief.")] if system else []
    for number in range(exchanges):
        turns += [Message("user", ("What is 2 + 2?", "Sure?")[number]), Message("assistant", answers[number])]
    return turns


def stretches(row: Row) -> list[tuple[int, int]]:
    """The trained tokens, from where to where."""
    edges = [
        index for index, (before, now) in enumerate(pairwise([False, *row.completion_mask, False])) if before != now
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, DAY)


@pytest.mark.usefixtures("on_day")
@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_the_prompt_is_the_one_of_other_software(name: str) -> None:
    checked = 0
    for marks in ("foreign", "special"):
        for system in (False, True):
            for exchanges in (1, 2):
                for answers in ANSWERS.values():
                    checked += check(name, marks, conversation(system, exchanges, answers))
    assert checked >= 8


def check(name: str, marks: str, messages: list[Message]) -> bool:
    """Checks one conversation. Returns False if the template does not accept its turns."""
    template, prompt = template_of(name, marks), stock(name, marks, messages[:-1])
    if prompt is None:
        assert name in ("trl/gemma",) and messages[0].role == "system"
        return False
    assert template.prompt(messages[:-1]) == prompt
    row = template.encode_many([messages])[0]
    if isinstance(row, InvalidRow):
        assert "generation prompt closes the thought" in row.reason and "</think>" in messages[-1].content
        return False
    *earlier, (start, end) = stretches(row)
    assert list(row.input_ids[: len(prompt)]) == prompt
    check_untrained(template, list(row.input_ids[len(prompt) : start]))
    assert row.input_ids[end - 1] in template.end_ids
    own_prompts = [stock(name, marks, messages[:index]) for index in range(1, len(messages) - 1)]
    for first, _ in earlier:
        before = [own for own in own_prompts if own is not None and list(row.input_ids[: len(own)]) == own]
        assert before, "an earlier answer does not follow its own prompt"
        check_untrained(template, list(row.input_ids[max(map(len, before)) : first]))
    check_parsed(template, prompt, list(row.input_ids[len(prompt) : end]), messages[-1].content)
    return True


def check_untrained(template: ChatTemplate, ids: list[int]) -> None:
    """Between a prompt and what is trained there is nothing, or an empty thought."""
    assert re.fullmatch(r"\s*(?:(?:<think>)?\s*</think>\s*)?", template.decode(ids, special_tokens=True))


def check_parsed(template: ChatTemplate, prompt: list[int], trained: list[int], answer: str) -> None:
    """A reasoning parser finds the thought and the answer of the row in what is trained."""
    text = template.decode(trained, special_tokens=True)
    thought, _, rest = answer.rpartition("</think>")
    assert rest.strip() in text
    if thought:
        assert "Two and two." in text, "its thought is dropped"
    if template.decode(prompt, special_tokens=True).rstrip().endswith("<think>"):
        found, closing, answered = text.partition("</think>")
        assert closing and "<think>" not in text and "</think>" not in answered
        assert found.strip() == ("Two and two." if thought else "")
        assert answered.strip().startswith(rest.strip())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="the base's chat template"):
        ChatTemplate.from_tokenizer(tiny(REFUSED[name]))


@pytest.mark.parametrize("name", TRL_IMAGE_TEMPLATES)
def test_trls_templates_for_images_are_refused_by_name(name: str) -> None:
    pytest.importorskip("trl")
    with pytest.raises(UserError, match="the base's chat template"):
        ChatTemplate.from_tokenizer(tiny(TEMPLATES[f"trl/{name}"]))


def trained(name: str, answer: str, marks: str = "foreign") -> str | None:
    """What is trained behind one question; None for a row that is dropped."""
    template = template_of(name, marks)
    row = template.encode_many([[Message("user", "Hm?"), Message("assistant", answer)]])[0]
    if isinstance(row, InvalidRow):
        return None
    ((start, end),) = stretches(row)
    return template.decode(row.input_ids[start:end], special_tokens=True)


@pytest.mark.parametrize("marks", ["foreign", "special"])
@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("r1", "It is 4.", "It is 4.</s>"),
        ("r1", f"{THOUGHT}It is 4.", "Two and two.\n</think>\n\nIt is 4.</s>"),
        ("r1", "Two and two.\n</think>\n\nIt is 4.", "Two and two.\n</think>\n\nIt is 4.</s>"),
        ("r1", "<think>\n\n</think>\n\nIt is 4.", "It is 4.</s>"),
        ("r1", "<think>Two.</think>It is 4.", "Two.</think>It is 4.</s>"),
        ("empty thought", "It is 4.", "It is 4.<|im_end|>"),
        ("empty thought", f"{THOUGHT}It is 4.", "Two and two.\n</think>\n\nIt is 4.<|im_end|>"),
        ("empty thought", "Two.</think>It is 4.", "Two.</think>It is 4.<|im_end|>"),
        ("closing tag", "It is 4.", "It is 4.</s>"),
        ("closing tag", f"{THOUGHT}It is 4.", "Two and two.</think>It is 4.</s>"),
        ("two thoughts", "It is 4.", "It is 4.<|im_end|>"),
        ("two thoughts", "<think>\nTwo.\n</think>It is 4.", "Two.\n</think>\n\nIt is 4.<|im_end|>"),
        ("drops thoughts", "It is 4.", "It is 4.</s>"),
        ("drops thoughts", f"{THOUGHT}It is 4.", f"{THOUGHT}It is 4.</s>"),
        ("drops thoughts", "<think>4</think> It is 4.", "<think>4</think> It is 4.</s>"),
        ("closed thought", "It is 4.", "It is 4.<|im_end|>"),
        ("closed thought", f"{THOUGHT}It is 4.", None),
        ("closed thought", "<think>\n\n</think>\n\nIt is 4.", "It is 4.<|im_end|>"),
        ("always closed", "It is 4.", "It is 4.<|im_end|>"),
        ("always closed", f"{THOUGHT}It is 4.", None),
        ("other words", "It is 4.", "It is 4.</s>"),
        ("other words", "<think>4</think>4", "<think>4</think>4</s>"),
        ("no generation prompt", "It is 4.", "<|im_start|>assistant\nIt is 4.<|im_end|>"),
    ],
)
def test_what_is_trained_behind_the_prompt(name: str, answer: str, expected: str | None, marks: str) -> None:
    assert trained(name, answer, marks) == expected


WRITES_THOUGHT = CHATML.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
)


@pytest.mark.parametrize("space", ["\u2028", " ", "\n\n", "\u3000"])
@pytest.mark.parametrize("tags", [False, True])
def test_an_answer_of_white_space_is_trained_with_its_end_token(space: str, tags: bool) -> None:
    one = tiny(WRITES_THOUGHT)
    if tags:
        one.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    template = ChatTemplate.from_tokenizer(one)
    row = template.encode([Message("user", "Hm?"), Message("assistant", space)])
    ((start, end),) = stretches(row)
    text = template.decode(row.input_ids[start:end], special_tokens=True)
    assert text == f"{space}<|im_end|>"


def test_no_bos_where_the_template_has_none() -> None:
    """Zephyr's template on a tokenizer that puts one before every text of its own."""
    one = tiny(CHATML)
    one.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", one.bos_token_id)]
    )
    assert one("a").input_ids[0] == one.bos_token_id
    template, messages = ChatTemplate.from_tokenizer(one), [Message("user", "Hm?"), Message("assistant", "Yes.")]
    stock_ids = one.apply_chat_template(plain(messages[:1]), add_generation_prompt=True, return_dict=False)
    assert template.prompt(messages[:1]) == stock_ids and one.bos_token_id not in stock_ids
    assert list(template.encode(messages).input_ids[: len(stock_ids)]) == stock_ids
    assert not template.begins_with_bos


def test_a_completion_becomes_a_turn_with_the_tag_that_stood_in_the_prompt() -> None:
    opens, plain = template_of("r1", "foreign"), template_of("other words", "foreign")
    assert opens.answer_content("Two.\n</think>\n\nIt is 4.") == "<think>\nTwo.\n</think>\n\nIt is 4."
    assert opens.answer_content("cut off") == "cut off"
    assert plain.answer_content("Two.</think>It is 4.") == "Two.</think>It is 4."
