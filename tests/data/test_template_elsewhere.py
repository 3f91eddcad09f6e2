"""The chat template that leaves with a model writes the text that this kit trained with."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenizer

from lowrank_tune.data import Template
from lowrank_tune.types import Message

TALK = [
    Message("system", "Be kind."),
    Message("user", "What is 12 + 30?"),
    Message("assistant", "It is 42."),
    Message("user", "$5?"),
]


@pytest.mark.parametrize("name", ["kit", "words", "chatml", "llama3"])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[1:2]], ids=["with system", "without", "a question"])
def test_the_template_for_others_asks_as_this_kit_does(name: str, talk: list[Message]) -> None:
    one = tokenizer(name)
    template = Template.of(one)
    one.chat_template = template.jinja
    told = one.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in talk], add_generation_prompt=True, tokenize=False
    )
    assert told == template.decode(template.prompt(talk), marks=True)
