"""One message of a conversation, with the reasoning and the tool calls of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

MessageRole = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a function by the assistant. `arguments`: a JSON object as text, with the keys in their own order."""

    name: str
    arguments: str = "{}"
    call_id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `reasoning_content` and `tool_calls` belong to a message of the assistant. A message of role `tool` is the result of
    a call: `name` is its function and `tool_call_id` the id of the call, both optional.
    """

    role: MessageRole
    content: str
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""

    def texts(self) -> Iterator[str]:
        """Yields every text of the message."""
        yield self.content
        yield self.reasoning_content
        yield self.name
        yield self.tool_call_id
        for call in self.tool_calls:
            yield call.name
            yield call.arguments
            yield call.call_id


def has_reasoning(messages: Iterable[Message]) -> bool:
    """Returns whether an answer has reasoning, or a thought in its text."""
    return any(message.reasoning_content or "</think>" in message.content for message in messages)


def has_tools(messages: Iterable[Message], tools: str) -> bool:
    """Returns whether tools are defined or called."""
    return bool(tools) or any(message.tool_calls for message in messages)
