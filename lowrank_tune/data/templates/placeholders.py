"""Placeholders for control tokens in the text of a row: the only control tokens of a rendering are then the template's.

Where the tags of thoughts (`<think>`, `</think>`) are control tokens, those in a message of the assistant stay: they
are part of the answer that is trained.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from lowrank_tune.data.formats import ChatMessages
from lowrank_tune.data.message import Message, ToolCall
from lowrank_tune.data.templates.backend import TokenizerBackend
from lowrank_tune.data.templates.generation_prompt import THOUGHT_TAG
from lowrank_tune.json_files import parse_json

FIRST_PLACEHOLDER = 0xF0000
"""The first code point of a private plane of Unicode: its characters replace control tokens."""
ESCAPED = re.compile(
    r"\\U(?P<code>000[fF][0-9a-fA-F]{4})|(?P<pair>\\u[dD][bB]8[0-9a-fA-F]\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
"""A placeholder as Python's repr and as JSON in ASCII write it, which templates apply to arguments of calls."""


class Placeholders:
    """One private character for each control token of a tokenizer."""

    def __init__(self, backend: TokenizerBackend) -> None:
        self._pattern = backend.special_pattern
        self._token_of = {FIRST_PLACEHOLDER + index: token for index, token in enumerate(backend.special_tokens)}
        self._placeholder_of = {token: chr(code) for code, token in self._token_of.items()}
        self._private = frozenset(self._placeholder_of.values())

    def insert(self, messages: ChatMessages) -> list[Message]:
        """Returns the messages with a private character for each control token in their texts."""
        return [self._insert(message) for message in messages]

    def insert_json(self, text: str) -> str:
        """Returns a JSON text with a private character for each control token in its strings; an empty text as it
        is."""
        # Control tokens have no meaning in JSON, but its strings may contain them as escapes.
        if not text or (self._pattern.search(text) is None and "\\" not in text):
            return text
        return json.dumps(self._replace_in(parse_json(text)), ensure_ascii=False)

    def _insert(self, message: Message) -> Message:
        content = self._pattern.sub(
            self._keep_thought_tag if message.role == "assistant" else self._of, message.content
        )
        plain = Message(message.role, content)
        if message == Message(message.role, message.content):
            return plain
        return replace(
            plain,
            reasoning_content=self._replace(message.reasoning_content),
            tool_calls=tuple(self._insert_call(call) for call in message.tool_calls),
            name=self._replace(message.name),
            tool_call_id=self._replace(message.tool_call_id),
        )

    def _insert_call(self, call: ToolCall) -> ToolCall:
        return ToolCall(self._replace(call.name), self.insert_json(call.arguments), self._replace(call.call_id))

    def _replace_in(self, value: Any) -> Any:
        """Returns a JSON value with the strings in it replaced."""
        if isinstance(value, str):
            return self._replace(value)
        if isinstance(value, list):
            return [self._replace_in(item) for item in value]
        if isinstance(value, dict):
            return {self._replace(key): self._replace_in(item) for key, item in value.items()}
        return value

    def _replace(self, text: str) -> str:
        return self._pattern.sub(self._of, text)

    def _of(self, match: re.Match[str]) -> str:
        return self._placeholder_of[match.group()]

    def _keep_thought_tag(self, match: re.Match[str]) -> str:
        token = match.group()
        return token if THOUGHT_TAG.fullmatch(token) else self._placeholder_of[token]

    def found_in(self, text: str) -> bool:
        """Returns whether a text contains a placeholder."""
        if not text.isascii() and not self._private.isdisjoint(text):
            return True
        return ESCAPED.search(text) is not None

    def restore(self, text: str) -> str:
        """Returns the text with the plain characters of each control token instead of its placeholder."""
        return ESCAPED.sub(self._unescape, text).translate(self._token_of)

    def _unescape(self, match: re.Match[str]) -> str:
        character = parse_json(f'"{match.group()}"') if match["pair"] else chr(int(match["code"], 16))
        return self._token_of.get(ord(character), match.group())
