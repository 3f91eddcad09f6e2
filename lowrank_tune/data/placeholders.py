"""Stand-ins for control tokens in a row's own text: the only control tokens in a rendering are then the template's.

Where the tags of thoughts (`<think>`, `</think>`) are control tokens, those in an assistant's turn stay: they are part
of the answer that is trained.
"""

from __future__ import annotations

from lowrank_tune.data.fallback_templates import ChatMessages
from lowrank_tune.data.generation_prompt import THOUGHT_TAG
from lowrank_tune.data.message import Message
from lowrank_tune.data.tokenizer_backend import TokenizerBackend

FIRST_PLACEHOLDER = 0xF0000  # characters of a private plane stand for control tokens in a row's own text


class Placeholders:
    """One private character for each control token of a tokenizer."""

    def __init__(self, backend: TokenizerBackend) -> None:
        self._pattern = backend.special_pattern
        self._names = list(backend.special_tokens)
        self._characters = {name: chr(FIRST_PLACEHOLDER + index) for index, name in enumerate(self._names)}
        self._of_assistant = self._characters | {name: name for name in self._names if THOUGHT_TAG.fullmatch(name)}
        self._private = frozenset(self._characters.values())

    def insert(self, messages: ChatMessages) -> list[Message]:
        """The turns, with a private character for each control token that stands in them."""
        return [Message(message.role, self._replace(message)) for message in messages]

    def _replace(self, message: Message) -> str:
        if message.role == "assistant":
            characters = self._of_assistant
        else:
            characters = self._characters
        return self._pattern.sub(lambda match: characters[match.group()], message.content)

    def found_in(self, text: str) -> bool:
        """Whether a text holds one."""
        return not text.isascii() and not self._private.isdisjoint(text)

    def restore(self, text: str) -> str:
        """The text with the control tokens as the plain characters that they are there."""
        return "".join(
            self._names[index] if 0 <= (index := ord(character) - FIRST_PLACEHOLDER) < len(self._names) else character
            for character in text
        )
