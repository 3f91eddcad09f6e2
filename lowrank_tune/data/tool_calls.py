"""Tool calls of an assistant's turn, and the definitions of the functions that it may call, from the shapes of data
sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_tune.data.message import ToolCall
from lowrank_tune.data.row_values import (
    Columns,
    InvalidRow,
    RawRow,
    first_present,
    is_list,
    json_text,
    json_value,
    optional_text_of,
    text_of,
)

CALL = "a tool call"
ARGUMENTS = "the arguments of a tool call"
TOOLS = "`tools`"
TOOL_COLUMNS = ("tools", "functions")
"""The columns that may contain the definitions; `columns` maps `tools`."""


def tool_calls_of(value: Any) -> tuple[ToolCall, ...]:
    """Returns the calls in a list, in one object, or in either as JSON text. Raises InvalidRow."""
    if isinstance(value, str):
        value = json_value(value, CALL)
    if isinstance(value, Mapping):
        value = [value]
    if not is_list(value):
        raise InvalidRow("the tool calls are not a list of objects")
    return tuple(_tool_call_of(call) for call in value)


def _tool_call_of(value: Any) -> ToolCall:
    """Returns a call of the form `{id, type, function: {name, arguments}}` or `{name, arguments}`."""
    if isinstance(value, str):
        value = json_value(value, CALL)
    if not isinstance(value, Mapping):
        raise InvalidRow("a tool call is not an object")
    function = value
    if value.get("function") is not None:
        function = value["function"]
    if not isinstance(function, Mapping):
        raise InvalidRow("the function of a tool call is not an object")
    arguments = first_present(function, "arguments", "parameters")
    call_id = first_present(
        value,
        "id",
        "call_id",
        "tool_call_id",
    )
    return ToolCall(
        _name_of(function, CALL),
        _arguments_of(arguments),
        optional_text_of(call_id, "id of a tool call"),
    )


def _name_of(function: RawRow, label: str) -> str:
    name = function.get("name")
    if name is None:
        raise InvalidRow(f"{label} without a name")
    if not isinstance(name, str):
        raise InvalidRow(f"the name of {label} is not text")
    if not name.strip():
        raise InvalidRow(f"{label} without a name")
    return text_of(name, f"name of {label}")


def _arguments_of(value: Any) -> str:
    """Returns arguments, an object or its JSON text, as JSON text. A function without parameters may have none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "{}"
    arguments = json_value(value, ARGUMENTS)
    if arguments is None:
        return "{}"
    if not isinstance(arguments, dict):
        raise InvalidRow("the arguments of a tool call are not an object")
    return json_text(arguments, ARGUMENTS)


def tools_of(row: RawRow, columns: Columns) -> str:
    """Returns the tools of a row as the JSON text of a list, each in the form of OpenAI; empty without any. Raises
    InvalidRow."""
    names: tuple[str, ...] = TOOL_COLUMNS
    if "tools" in columns:
        names = (columns["tools"],)
    value = first_present(row, *names)
    if isinstance(value, str) and "tools" not in columns and not value.lstrip().startswith(("[", "{")):
        # a column of this name with words is about something else
        return ""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    tools = json_value(value, TOOLS)
    if isinstance(tools, Mapping):
        tools = [tools]
    if tools is None or (is_list(tools) and not len(tools)):
        return ""
    if not is_list(tools):
        raise InvalidRow("`tools` is not a list of functions")
    return json_text([_definition_of(tool) for tool in tools], TOOLS)


def _definition_of(tool: Any) -> Mapping[str, Any]:
    """Returns a definition as `{type: function, function: {name, ...}}`, with the keys in their own order."""
    if isinstance(tool, str):
        tool = json_value(tool, TOOLS)
    if not isinstance(tool, Mapping):
        raise InvalidRow("a tool in `tools` is not an object")
    if tool.get("type", "function") != "function":
        raise InvalidRow("a tool in `tools` is not a function")
    function = tool.get("function")
    if function is None:
        _name_of(tool, "a tool")
        bare = {key: value for key, value in tool.items() if key != "type"}
        return {
            "type": "function",
            "function": bare,
        }
    if not isinstance(function, Mapping):
        raise InvalidRow("the function of a tool in `tools` is not an object")
    _name_of(function, "a tool")
    if "type" in tool:
        return tool
    return {
        "type": "function",
        **tool,
    }
