"""The worker renders what `apply_chat_template(tokenize=False)` renders in this process: for the templates of the
tests, those that TRL comes with, and templates that write the date."""

from __future__ import annotations

import importlib.util
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import OWN, tiny

from lowrank_tune.data import InvalidRow
from lowrank_tune.data.templates.date import with_date
from lowrank_tune.data.templates.render_process import RenderRequest, Template, shared_process

DATED = "{{ strftime_now('%d %b %Y') }}|{{ date_string | default('none') }}|" + OWN["chatml"]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds \U0001f600 numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number", "default": 1.5}}, "required": ["a"]},
    },
}
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "What is 12 + 30?\n\nDraw \U0001f600 {{ x }} \0 <b> 'x'."}
ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is 42. "}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": [1, None, {"c": 2.5}]}}}
    ],
}
REQUESTS: list[RenderRequest] = [
    RenderRequest([USER], True),
    RenderRequest([USER], False),
    RenderRequest([SYSTEM, USER, ANSWER], False),
    RenderRequest([SYSTEM, USER, ANSWER, USER], True),
    RenderRequest([USER, ANSWER, USER, ANSWER], False),
    RenderRequest([ANSWER, ANSWER], False),
    RenderRequest([{"role": "user", "content": "No name.", "name": None}], True),
    RenderRequest([USER], True, 0, {"tools": [TOOL]}),
    RenderRequest([USER, CALL, {"role": "tool", "content": "[42]", "name": "add"}], True, 0, {"tools": [TOOL]}),
    RenderRequest([USER], True, 0, {"enable_thinking": False, "documents": [{"title": "a", "text": "b"}]}),
    RenderRequest([{"role": "user", "content": [{"type": "text", "text": "In parts."}]}], True),
]


def trl_templates() -> dict[str, str]:
    """Without importing TRL, which takes seconds."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    return {
        file.name: file.read_text() for file in sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    }


def expected(tokenizer: Any, template: str, request: RenderRequest) -> str | None:
    """The text; None if the template refuses the conversation."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in request.messages]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=request.add_generation_prompt,
            tokenize=False,
            **request.arguments,
        )
    except Exception:
        return None
    return str(text)


def rendered(tokenizer: Any, template: str) -> list[str | None]:
    made = Template(template, tokenizer.special_tokens_map)
    texts: list[str | InvalidRow] = []
    while len(texts) < len(REQUESTS):
        texts += shared_process().render_some(made, REQUESTS[len(texts) :])
    return [None if isinstance(text, InvalidRow) else text for text in texts]


@pytest.mark.parametrize("name", [*OWN, "dated", "fixed date"])
def test_texts_are_those_of_apply_chat_template(name: str) -> None:
    template = {**OWN, "dated": DATED, "fixed date": with_date(DATED, date(2026, 7, 26))}[name]
    tokenizer = tiny(template)
    found = rendered(tokenizer, template)
    assert found == [expected(tokenizer, template, request) for request in REQUESTS]
    assert any(found)


@pytest.mark.slow
def test_texts_of_the_templates_of_trl_are_those_of_apply_chat_template() -> None:
    templates = trl_templates()
    if not templates:
        pytest.skip("needs TRL")
    tokenizer = tiny()
    num_texts = 0
    for name, template in templates.items():
        found = rendered(tokenizer, template)
        assert found == [expected(tokenizer, template, request) for request in REQUESTS], name
        num_texts += sum(text is not None for text in found)
    # most templates accept most conversations
    assert num_texts > 6 * len(templates)
