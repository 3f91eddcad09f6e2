"""Reasoning and tools as plain text, for bases without a chat template: the format of Hermes, which servers parse.

The tools are listed in the system message, a call is a JSON object between `<tool_call>` and `</tool_call>`, a result
is a message of the user between `<tool_response>` and `</tool_response>`, and reasoning precedes an answer between
`<think>` and `</think>`.
"""

from __future__ import annotations

import json

from lowrank_tune.data.formats import ChatMessages
from lowrank_tune.data.message import Message, ToolCall
from lowrank_tune.json_files import parse_json

BEFORE_TOOLS = "# Tools\n\nYou may call functions. Their signatures:\n<tools>\n"
AFTER_TOOLS = (
    "</tools>\n\nFor each call, write the name of the function and its arguments as a JSON object:\n"
    '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
)
TEXT_MACRO = (
    "{% macro text(m) %}"
    "{% if m['reasoning_content'] %}{{ '<think>\\n' + m['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ '<tool_response>\\n' + m['content'] + '\\n</tool_response>' }}"
    "{% else %}{{ m['content'] or '' }}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}{% set f = call['function'] or call %}"
    "{{ '\\n' if m['content'] or not loop.first else '' }}"
    "{{ '<tool_call>\\n{\"name\": ' + f['name'] | tojson + ', \"arguments\": ' }}"
    "{{ f['arguments'] if f['arguments'] is string else f['arguments'] | tojson }}{{ '}\\n</tool_call>' }}"
    "{% endfor %}{% endmacro %}"
)
"""Jinja's macro of what `message_text` returns."""
TOOLS_MACRO = (
    "{% macro tools_text() %}"
    f"{{{{ {BEFORE_TOOLS!r} }}}}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
    f"{{{{ {AFTER_TOOLS!r} }}}}"
    "{% endmacro %}"
)
"""Jinja's macro of what `tools_text` returns."""


def as_text(messages: ChatMessages, tools: str) -> list[Message]:
    """Returns messages of the system, the user and the assistant that have contents alone."""
    texts = [Message("user" if each.role == "tool" else each.role, message_text(each)) for each in messages]
    if not tools:
        return texts
    definitions = tools_text(tools)
    if texts and texts[0].role == "system":
        return [Message("system", f"{texts[0].content}\n\n{definitions}"), *texts[1:]]
    return [Message("system", definitions), *texts]


def tools_text(tools: str) -> str:
    """Returns the definitions of tools, a JSON list, as text."""
    lines = [json.dumps(tool, ensure_ascii=False) + "\n" for tool in parse_json(tools)]
    return BEFORE_TOOLS + "".join(lines) + AFTER_TOOLS


def message_text(message: Message) -> str:
    """Returns the content of a message with its reasoning before it and its tool calls after it."""
    if message.role == "tool":
        return f"<tool_response>\n{message.content}\n</tool_response>"
    text = message.content
    if message.reasoning_content:
        text = f"<think>\n{message.reasoning_content}\n</think>\n\n{text}"
    calls = "\n".join(_call_text(call) for call in message.tool_calls)
    separator = "\n" if message.content and calls else ""
    return f"{text}{separator}{calls}"


def _call_text(call: ToolCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    arguments = json.dumps(parse_json(call.arguments), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
