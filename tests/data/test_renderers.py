"""Prompts and rows have the ids of the hand-made renderers of the package `renderers` (0.1.12 needs `httpx` besides):
skipped where it is not installed."""

from __future__ import annotations

import functools
import importlib
import json
import re
from typing import Any

import pytest
from test_trl_masks import CASES, trl_folder
from tokenizers_for_tests import tiny

from lowrank_tune.data import ChatTemplate, InvalidRow
from lowrank_tune.data.templates.message_fields import MessageFields

RENDERERS = {
    "qwen3": ("renderers.qwen3", "Qwen3Renderer"),
    "qwen3_5_think": ("renderers.qwen35", "Qwen35Renderer"),
    "qwen3_6": ("renderers.qwen36", "Qwen36Renderer"),
    "qwen3_8": ("renderers.qwen38", "Qwen38Renderer"),
    "nemotron_3_nano": ("renderers.nemotron3", "Nemotron3Renderer"),
}
"""TRL's name of a template, and the renderer of the same family."""
TOKENS = {
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
}
FIELDS = MessageFields(reasoning_key="reasoning_content", writes_calls=True, writes_tools=True)


@functools.cache
def tokenizer_of(name: str) -> Any:
    folder = trl_folder()
    if folder is None:
        pytest.skip("needs TRL")
    text = (folder / f"{name}.jinja").read_text()
    made = tiny(text, split=True)
    made.add_special_tokens({"extra_special_tokens": sorted(TOKENS | set(re.findall(r"<\|\w+\|>", text)))})
    return made


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RENDERERS)
def test_prompts_and_rows_are_those_of_renderers(name: str, case: str) -> None:
    module, class_name = RENDERERS[name]
    pytest.importorskip("renderers", exc_type=ImportError)
    renderer = getattr(importlib.import_module(module), class_name)(tokenizer_of(name))
    template = ChatTemplate.from_tokenizer(tokenizer_of(name))
    messages, tools = CASES[case]
    plain = [FIELDS.to_dict(message) for message in messages]
    definitions = json.loads(tools) if tools else None
    prompt = renderer.render(plain[:-1], tools=definitions, add_generation_prompt=True).token_ids
    assert template.prompt(messages[:-1], tools) == prompt
    (rows,) = template.encode_all([messages], [tools])
    assert not isinstance(rows, InvalidRow)
    row = renderer.render(plain, tools=definitions).token_ids
    if messages[-1].reasoning_content or name == "qwen3":
        assert list(rows[0].input_ids) == row
        return
    # The generation prompt opens a thought: the row keeps its ids and closes the thought after them.
    assert list(rows[0].input_ids[: len(prompt)]) == prompt
    texts = [re.sub(r"<think>\s*</think>", "", template.decode(ids, True)) for ids in (rows[0].input_ids, row)]
    assert texts[0] == texts[1]
