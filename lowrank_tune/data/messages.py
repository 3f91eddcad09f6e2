"""From the turns of a list to messages: roles, reasoning, tool calls and their results; and the order of messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowrank_tune.data.message import Message, MessageRole, ToolCall
from lowrank_tune.data.row_values import (
    LONE_SURROGATE,
    Columns,
    InvalidRow,
    RawRow,
    first_present,
    is_list,
    is_text,
    is_text_parts,
    json_text,
    json_value,
    optional_text_of,
    text_of,
)
from lowrank_tune.data.tool_calls import tool_calls_of

ChatMessages = Sequence[Message]

ROLES: dict[str, MessageRole] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose text is a call, or a list of calls, as JSON."""
REASONING_KEYS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)
CALL_MARKERS = (
    "<tool_call>",
    "<function_call>",
    "<functioncall>",
    "<function=",
    "<|python_tag|>",
    "[TOOL_CALLS]",
)
"""What a call begins with that is written into the text of an answer. Such a call stays text."""
THOUGHT_OPENING = "<think>"
THOUGHT_CLOSING = "</think>"
RESULT = "a tool result"
NO_CALL = "a tool result without a tool call before it"
NO_RESULT = "a tool call without its result"


def system_of(row: RawRow, columns: Columns) -> list[Message]:
    """Returns the system message of a row that has it in a column of its own; else an empty list."""
    value = row.get(columns.get("system", "system"))
    if value is None:
        return []
    return [Message("system", text_of(value, "system prompt"))]


def messages_of(value: Any, name: str) -> list[Message]:
    """Returns the messages of a list in a column, with the kit's names of the roles. Raises InvalidRow."""
    if not is_list(value) or isinstance(value, bytes):
        raise InvalidRow(f"`{name}` is not a list of turns")
    return [message_of(turn) for turn in value]


def message_of(turn: Any) -> Message:
    """Returns one turn of a list as a message. Raises InvalidRow."""
    if not isinstance(turn, Mapping):
        raise InvalidRow("a turn is not an object")
    name = first_present(turn, "role", "from")
    if not isinstance(name, str):
        raise InvalidRow("a turn has no role")
    if name.lower() in CALL_ROLES:
        return _call_message(turn)
    if name.lower() not in ROLES:
        raise InvalidRow("a turn has an unknown role")
    role = ROLES[name.lower()]
    content = first_present(turn, "content", "value")
    if role == "tool":
        return _result_message(turn, content)
    calls = _calls_of(turn)
    if calls and role != "assistant":
        raise InvalidRow("tool calls in a turn that is not the assistant's")
    if calls and (not content or (isinstance(content, str) and not content.strip())):
        content = ""
    if content is None:
        raise InvalidRow("a turn has no content")
    text = text_of(content, "text of a turn")
    if role != "assistant":
        return Message(role, text)
    return Message(
        role,
        text,
        _reasoning_of(turn),
        calls,
    )


def _reasoning_of(turn: RawRow) -> str:
    """Returns the reasoning before an answer, from the first of `REASONING_KEYS` that is not blank."""
    for key in REASONING_KEYS:
        text = optional_text_of(turn.get(key), "reasoning of a turn")
        if text.strip():
            return text
    return ""


def _calls_of(turn: RawRow) -> tuple[ToolCall, ...]:
    """Returns the calls in `tool_calls` or, as OpenAI once wrote it, the one in `function_call`."""
    value = turn.get("tool_calls") or turn.get("function_call")
    if isinstance(value, Mapping) and all(part is None for part in value.values()):
        # a table writes the call of a turn without one so
        return ()
    return tool_calls_of(value) if value else ()


def _call_message(turn: RawRow) -> Message:
    """Returns the turn of a call as a message of the assistant. A thought before the call is its content."""
    value = first_present(turn, "content", "value")
    if value is None:
        raise InvalidRow("a turn has no content")
    thought = ""
    if isinstance(value, str) and value.lstrip().startswith(THOUGHT_OPENING):
        before, closing, after = value.partition(THOUGHT_CLOSING)
        if closing:
            thought = text_of(before + closing, "text of a turn")
            value = after
    calls = tool_calls_of(value)
    if not calls:
        raise InvalidRow("a turn of a tool call has no call")
    return Message(
        "assistant",
        thought,
        _reasoning_of(turn),
        calls,
    )


def _is_only_text(content: Any) -> bool:
    """Returns whether the content of a result is parts of text alone, and not records with a column `text`."""
    return is_text_parts(content) and all(part.keys() <= {"type", "text"} for part in content)


def _result_message(turn: RawRow, content: Any) -> Message:
    """Returns the result of a call. One that is not text becomes JSON; a function may return nothing."""
    if content is None:
        text = ""
    elif isinstance(content, str) or _is_only_text(content):
        text = text_of(content, "text of a turn")
    else:
        text = json_text(json_value(content, RESULT), RESULT)
    return Message(
        "tool",
        text,
        name=optional_text_of(turn.get("name"), "name of a tool"),
        tool_call_id=optional_text_of(turn.get("tool_call_id"), "id of a tool call"),
    )


def text_fault(messages: Iterable[Message]) -> str | None:
    """Returns the fault of messages with a text that UTF-8 cannot encode; None without one."""
    for message in messages:
        if not all(map(is_text, message.texts())):
            return LONE_SURROGATE
    return None


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Returns the messages, after this system prompt if they have none."""
    if system and messages[0].role != "system":
        return (Message("system", system), *messages)
    return messages


def check_order(messages: Sequence[Message], require_answer: bool) -> tuple[Message, ...]:
    """Returns the messages in a valid order. Raises InvalidRow.

    Two messages of the user in a row are joined. Two of the assistant are a fault, because it is unknown which of them
    should end the turn, unless the second one has nothing but tool calls: they are calls of one message. Every result
    of a tool stays a message of its own.
    """
    merged: list[Message] = []
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            raise InvalidRow("a system turn that is not the first")
        if message.role == "system" and not message.content.strip():
            continue
        _check_content(message)
        previous = merged[-1] if merged else None
        if previous is not None and previous.role == message.role != "tool":
            merged[-1] = _joined(previous, message)
            continue
        _check_calls(previous, message)
        merged.append(message)
    _check_ends([message.role for message in merged if message.role != "system"], require_answer)
    return tuple(merged)


def _check_content(message: Message) -> None:
    """Raises InvalidRow for a message without content, unless it is a tool call or a tool result."""
    if message.content.strip() or message.tool_calls or message.role == "tool":
        return
    raise InvalidRow("empty question" if message.role == "user" else "empty answer")


def _joined(previous: Message, message: Message) -> Message:
    """Returns two messages of one role as one. Raises InvalidRow."""
    if message.role != "assistant":
        return replace(previous, content=f"{previous.content}\n\n{message.content}")
    if not message.tool_calls or message.content.strip():
        raise InvalidRow(NO_RESULT if previous.tool_calls else "two assistant turns in a row")
    reasoning = (
        previous.reasoning_content,
        message.reasoning_content,
    )
    return replace(
        previous,
        reasoning_content="\n\n".join(text for text in reasoning if text),
        tool_calls=(*previous.tool_calls, *message.tool_calls),
    )


def _check_calls(previous: Message | None, message: Message) -> None:
    """Raises InvalidRow for a tool result without a call, and for a call without its result."""
    if message.role == "tool":
        if previous is None or not (previous.role == "tool" or calls_tool(previous)):
            raise InvalidRow(NO_CALL)
    elif previous is not None and previous.tool_calls:
        raise InvalidRow(NO_RESULT)


def calls_tool(message: Message) -> bool:
    """Returns whether a message of the assistant calls a tool, also in its text."""
    if message.role != "assistant":
        return False
    return bool(message.tool_calls) or any(marker in message.content for marker in CALL_MARKERS)


def _check_ends(roles: Sequence[str], require_answer: bool) -> None:
    """Raises InvalidRow for a conversation that begins or ends with the wrong role."""
    if not roles:
        raise InvalidRow("no turns")
    if require_answer and "assistant" not in roles:
        raise InvalidRow("no assistant turn")
    if roles[0] == "assistant":
        raise InvalidRow("the first turn is the assistant's")
    if require_answer and roles[-1] == "tool":
        raise InvalidRow("no answer: the last turn is a tool result")
    if require_answer and roles[-1] != "assistant":
        raise InvalidRow("no answer: the last turn is the user's")
