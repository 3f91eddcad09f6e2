"""Placeholders for control tokens in the text of a row: the only control tokens of a rendering are then the template's.

Where the tags of thoughts (`<think>`, `</think>`) are control tokens, those in a message of the assistant stay: they
are part of the answer that is trained.
"""

from __future__ import annotations

import re

from lowrank_tune.data.formats import ChatMessages
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.backend import TokenizerBackend
from lowrank_tune.data.templates.generation_prompt import THOUGHT_TAG

FIRST_PLACEHOLDER = 0xF0000
"""The first code point of a private plane of Unicode: its characters replace control tokens."""


class Placeholders:
    """One private character for each control token of a tokenizer."""

    def __init__(self, backend: TokenizerBackend) -> None:
        self._pattern = backend.special_pattern
        self._token_of = {FIRST_PLACEHOLDER + index: token for index, token in enumerate(backend.special_tokens)}
        self._placeholder_of = {token: chr(code) for code, token in self._token_of.items()}
        self._private = frozenset(self._placeholder_of.values())

    def insert(self, messages: ChatMessages) -> list[Message]:
        """Returns the messages with a private character for each control token in their text."""
        return [Message(message.role, self._replace(message)) for message in messages]

    def _replace(self, message: Message) -> str:
        def placeholder_of(match: re.Match[str]) -> str:
            token = match.group()
            if message.role == "assistant" and THOUGHT_TAG.fullmatch(token):
                return token
            return self._placeholder_of[token]

        return self._pattern.sub(placeholder_of, message.content)

    def found_in(self, text: str) -> bool:
        """Returns whether a text contains a placeholder."""
        return not text.isascii() and not self._private.isdisjoint(text)

    def restore(self, text: str) -> str:
        """Returns the text with the plain characters of each control token instead of its placeholder."""
        return text.translate(self._token_of)
