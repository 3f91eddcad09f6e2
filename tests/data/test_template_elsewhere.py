"""The chat template that leaves with a model writes the text that this kit trained with."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenizer

from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message

CONVERSATION = [
    Message("system", "Be kind."),
    Message("user", "What is 12 + 30?"),
    Message("assistant", "It is 42."),
    Message("user", "$5?"),
]


@pytest.mark.parametrize("name", ["kit", "words", "chatml", "llama3"])
@pytest.mark.parametrize(
    "conversation", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]], ids=["with system", "without", "a question"]
)
def test_the_exported_template_renders_the_same_prompt(name: str, conversation: list[Message]) -> None:
    one = tokenizer(name)
    template = ChatTemplate.from_tokenizer(one)
    one.chat_template = template.chat_template
    rendered = one.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in conversation], add_generation_prompt=True, tokenize=False
    )
    assert rendered == template.decode(template.prompt(conversation), special_tokens=True)
