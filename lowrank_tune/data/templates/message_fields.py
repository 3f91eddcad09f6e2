"""How a chat template reads the parts of a message that templates name differently: the reasoning and the tool calls of
an answer, results of tools, and the definitions of tools. Found by rendering made-up conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from lowrank_tune.data.formats import ChatMessages, InvalidRow
from lowrank_tune.data.message import Message, ToolCall
from lowrank_tune.json_files import parse_json

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The keys of a message in which templates look for reasoning."""
THINK = "<think>"
END_THINK = "</think>"
NO_CALLS = "tool calls, which the base's chat template does not write"
NO_TOOLS = "tools, which the base's chat template does not write"
NO_TEXT_BESIDE_CALLS = "text beside a tool call, which the base's chat template does not write"
PROBE_THOUGHT = "Perhaps nobody."
PROBE_CALL = ToolCall("find_askers", '{"minimum": 17}', "call00001")
PROBE_TEXT = "I look."
PYTHON_ARGUMENTS = "{'minimum'"
"""What a template writes that prints arguments without converting them to JSON."""
PROBE_RESULT = "There are 23."
PROBE_DESCRIPTION = "Finds who asks."
PROBE_TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": PROBE_CALL.name,
                "description": PROBE_DESCRIPTION,
                "parameters": {
                    "type": "object",
                    "properties": {"minimum": {"type": "integer", "description": "At least so many."}},
                    "required": ["minimum"],
                },
            },
        }
    ]
)
PROBE_TEXTS = (PROBE_CALL.name, "17", PROBE_RESULT)
"""What a template with tool calls writes of the probe."""
RenderProbe = Callable[["MessageFields", ChatMessages, str], str | InvalidRow]
"""Renders messages, given as these fields, with these tools."""


@dataclass(frozen=True)
class MessageFields:
    """The form in which a template accepts messages.

    `reasoning_key`: the key of reasoning; None if the template reads none, and reasoning is written into the content,
    as `<think>`. `has_own_tags`: it writes reasoning between other tags, so that a thought in a content is moved to
    the key. `writes_calls`, `writes_tools`: whether it writes tool calls with their results, and definitions of tools.
    `writes_text_beside_calls`: whether it writes the content of a message with calls. `arguments_as_text`: the
    arguments of a call are a JSON text and not an object. `null_content`: a message with calls and no text has the
    content null and not an empty text.
    """

    reasoning_key: str | None = None
    has_own_tags: bool = False
    writes_calls: bool = False
    writes_tools: bool = False
    writes_text_beside_calls: bool = False
    arguments_as_text: bool = False
    null_content: bool = False

    @classmethod
    def from_probes(
        cls,
        chat_template: str,
        question: Message,
        answer: Message,
        render: RenderProbe,
    ) -> Self:
        """Returns the fields of a template, by renderings of a question and its answer."""
        fields = cls()
        thoughtful = replace(answer, reasoning_content=PROBE_THOUGHT)
        for key in REASONING_KEYS:
            if key not in chat_template:
                continue
            text = render(replace(fields, reasoning_key=key), (question, thoughtful), "")
            if _contains(text, (PROBE_THOUGHT, answer.content)):
                fields = replace(fields, reasoning_key=key, has_own_tags=not _contains(text, (END_THINK,)))
                break
        if "tools" in chat_template:
            text = render(fields, (question, answer), PROBE_TOOLS)
            fields = replace(fields, writes_tools=_contains(text, (PROBE_DESCRIPTION,)))
        if "tool_calls" in chat_template:
            return fields._with_calls(question, answer, render)
        return fields

    def _with_calls(
        self,
        question: Message,
        answer: Message,
        render: RenderProbe,
    ) -> Self:
        """Returns the fields with the first form of a call that the template writes."""
        call = Message("assistant", "", tool_calls=(PROBE_CALL,))
        result = Message("tool", PROBE_RESULT, name=PROBE_CALL.name, tool_call_id=PROBE_CALL.call_id)
        tools = PROBE_TOOLS if self.writes_tools else ""
        for arguments_as_text in (False, True):
            for null_content in (False, True):
                fields = replace(
                    self,
                    writes_calls=True,
                    arguments_as_text=arguments_as_text,
                    null_content=null_content,
                )
                text = render(fields, (question, call, result, answer), tools)
                if _contains(text, PROBE_TEXTS) and not _contains(text, (PYTHON_ARGUMENTS,)):
                    with_text = render(fields, (question, replace(call, content=PROBE_TEXT)), tools)
                    return replace(fields, writes_text_beside_calls=_contains(with_text, (PROBE_TEXT,)))
        return self

    def fault(self, messages: ChatMessages, tools: str) -> str | None:
        """Returns what of a conversation the template does not write; None if it writes everything."""
        if tools and not self.writes_tools:
            return NO_TOOLS
        if not self.writes_calls and any(message.role == "tool" or message.tool_calls for message in messages):
            return NO_CALLS
        if not self.writes_text_beside_calls and any(message.tool_calls and message.content for message in messages):
            return NO_TEXT_BESIDE_CALLS
        return None

    def normalize(self, message: Message) -> Message:
        """Returns a message with its reasoning where the template reads it: in `reasoning_content`, or in the
        content."""
        if message.role != "assistant":
            return message
        if self.reasoning_key is None:
            if not message.reasoning_content:
                return message
            thought = f"{THINK}\n{message.reasoning_content}\n{END_THINK}"
            content = f"{thought}\n\n{message.content}" if message.content else thought
            return replace(message, content=content, reasoning_content="")
        if message.reasoning_content or not self.has_own_tags:
            return message
        head, closing, answer = message.content.partition(END_THINK)
        if not closing or not head.lstrip().startswith(THINK):
            return message
        reasoning = head.lstrip().removeprefix(THINK).strip("\n")
        return replace(message, content=answer.lstrip("\n"), reasoning_content=reasoning)

    def to_dict(self, message: Message) -> dict[str, Any]:
        """Returns a message as the template reads it."""
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            plain.update({key: value for key, value in _result_names(message) if value})
        if message.reasoning_content and self.reasoning_key is not None:
            plain[self.reasoning_key] = message.reasoning_content
        if message.tool_calls:
            plain["tool_calls"] = [self._call(call) for call in message.tool_calls]
            if self.null_content and not message.content:
                plain["content"] = None
        return plain

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments = call.arguments if self.arguments_as_text else parse_json(call.arguments)
        plain: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
        if call.call_id:
            plain["id"] = call.call_id
        return plain


def _result_names(message: Message) -> Sequence[tuple[str, str]]:
    return ("name", message.name), ("tool_call_id", message.tool_call_id)


def _contains(text: str | InvalidRow, parts: Sequence[str]) -> bool:
    return isinstance(text, str) and all(part in text for part in parts)
