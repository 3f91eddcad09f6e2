"""From the row of a data set to a conversation: a reader for each format, and a reason for every row that matches none.

The formats `preference` and `text` are detected here, and read in `preference_pairs.py` and `text_rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowrank_tune.batch import Row
from lowrank_tune.data.ground_truth import box_answer, extract_answer
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError

RawRow = Mapping[str, Any]
"""A row as a file or data set contains it: its columns."""
ChatMessages = Sequence[Message]
Columns = Mapping[str, str]
"""The setting `columns`: from the name of the format to the name in the data."""
Role = Literal["system", "user", "assistant"]

ROLES: dict[str, Role] = {
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
}
PROMPT_COMPLETION_PARTS: tuple[tuple[str, Role, str], ...] = (
    ("prompt", "user", "question"),
    ("completion", "assistant", "answer"),
)
"""Column, role and label in messages."""
TOOL_ROLES = (
    "tool",
    "tool_call",
    "tool_response",
    "function",
    "function_call",
    "function_response",
    "observation",
    "ipython",
)
EXAMPLE_COLUMNS = {"question": "problem", "answer": "solution"}


class InvalidRow(Exception):
    """Why one row cannot be used. The reason is one of a few phrases, by which rows are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


RawRowOrFault = RawRow | InvalidRow
RowOrFault = Row | InvalidRow
"""A row, or why it cannot be used."""


@dataclass(frozen=True)
class Conversation:
    """A system message or none, then user and assistant in turn; the last message is the assistant's. `ground_truth`:
    the gold answer. `tools`: the functions that the assistant may call, a JSON list as text; empty without any."""

    messages: tuple[Message, ...]
    ground_truth: str | None = None
    tools: str = ""

    @property
    def answer(self) -> str | None:
        """The text of the last message if it is the assistant's."""
        last = self.messages[-1]
        return last.content if last.role == "assistant" else None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages if self.answer is None else self.messages[:-1]


def detect_format(
    row: RawRow,
    columns: Columns | None = None,
    pairs: bool = False,
) -> str:
    """Returns the format of a row, by its columns. Columns that the user mapped take precedence. Raises UserError.

    A row that has a target besides its pair (`output`, `messages`) is a pair only with `pairs`, and then all rows are.
    """
    mapped = set(columns or ())
    present = mapped | {name for name, value in row.items() if value is not None}
    matching = _matching_formats(present, mapped, pairs)
    for format_name in matching:
        if any(mapped & set(aliases) for aliases in FORMATS[format_name].needed):
            return format_name
    if matching:
        return matching[0]
    if pairs:
        raise UserError(_no_pairs(row))
    raise UserError(_unknown_format(row))


def _matching_formats(
    present: set[str],
    mapped: set[str],
    pairs: bool,
) -> list[str]:
    matching = []
    for format_name, row_format in FORMATS.items():
        if all(present & set(aliases) for aliases in row_format.needed):
            matching.append(format_name)
    if pairs:
        return [name for name in matching if name == "preference"]
    if len(matching) > 1 and "text" in matching and "text" not in mapped:
        # Text beside the columns of another format is a part of that.
        matching.remove("text")
    if "preference" in matching:
        # A conversation beside a pair is the prompt of the pair, not a target.
        return [name for name in matching if name != "sharegpt"]
    return matching


def _no_pairs(row: RawRow) -> str:
    return (
        f"the columns {_column_names(row)} are not a preference pair, which `algorithm: reward` and `algorithm: dpo` "
        "learn from; expected `chosen` and `rejected`, and `prompt` unless both contain the whole conversation: "
        "name yours with `columns:`, as in `columns: {chosen: better, rejected: worse}`"
    )


def _unknown_format(row: RawRow) -> str:
    known = []
    for format_name, row_format in FORMATS.items():
        names = ", ".join(aliases[0] for aliases in row_format.needed)
        known.append(f"{format_name} ({names})")
    mapping = ", ".join(f"{name}: {column}" for name, column in EXAMPLE_COLUMNS.items())
    return (
        f"the columns {_column_names(row)} match no known format; known formats are {'; '.join(known)}: "
        f"name yours with `columns:`, as in `columns: {{{mapping}}}`"
    )


def _column_names(row: RawRow) -> str:
    names = ", ".join(sorted(map(str, row)))
    return names.encode("utf-8", "replace").decode() or "(none)"


def to_conversation(
    row: RawRow,
    format_name: str,
    columns: Columns,
    answer_rule: str = "auto",
    *,
    require_answer: bool = True,
) -> Conversation:
    """Returns the conversation of a row. Raises InvalidRow. Without `require_answer` the last message may be the
    user's."""
    if not isinstance(row, Mapping):
        raise InvalidRow("not an object with columns")
    row_format = FORMATS[format_name]
    assert row_format.read is not None, "`to_pair` reads pairs, and `text_of_row` plain text"
    conversation = Conversation(check_order(row_format.read(row, columns), require_answer))
    ground_truth = extract_answer(
        row,
        columns,
        answer_rule,
        conversation.answer or "",
        accept_bare_number=row_format.bare_answers,
    )
    return replace(conversation, ground_truth=ground_truth)


def box_final_answer(conversation: Conversation) -> Conversation:
    """Returns the conversation with the final answer of its last message in a box. Its gold answer stays the same."""
    if conversation.answer is None:
        return conversation
    boxed = Message("assistant", box_answer(conversation.answer))
    return replace(conversation, messages=(*conversation.prompt, boxed))


def value_of(
    row: RawRow,
    name: str,
    columns: Columns,
) -> Any:
    """Returns the value of a column that the format must have, under the mapped name or any of its possible names.
    Raises InvalidRow."""
    aliases = COLUMN_ALIASES[name]
    for alias in aliases:
        if alias in columns:
            aliases = (columns[alias],)
            break
    for alias in aliases:
        if row.get(alias) is not None:
            return row[alias]
    for alias in aliases:
        if alias in row:
            raise InvalidRow(f"column `{alias}` is null")
    raise InvalidRow(f"no column `{aliases[0]}`")


def is_list(value: Any) -> bool:
    """Returns whether a value is a list of values, and not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def text_of(value: Any, label: str) -> str:
    """Returns a text, or a number as text: 51.0 is "51". Raises InvalidRow."""
    text = _to_text(value)
    if text is None:
        raise InvalidRow(f"the {label} is not text")
    if not is_text(text):
        raise InvalidRow(f"the {label} contains a lone surrogate, which UTF-8 cannot encode")
    return text


def _to_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**400:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return repr(value)
    if isinstance(value, Sequence) and value and all(map(_is_text_part, value)):
        return "".join(part["text"] for part in value)
    return None


def _is_text_part(part: Any) -> bool:
    """Returns whether a value is a content part of type text, as some multi-modal libraries write them."""
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def is_text(text: str) -> bool:
    """Returns whether UTF-8 can encode a text. A JSON string may contain lone surrogates, which it cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_fault(messages: Iterable[Message]) -> str | None:
    """Returns the fault of messages with a text that UTF-8 cannot encode; None without one."""
    for message in messages:
        if not all(map(is_text, message.texts())):
            return "a lone surrogate, which UTF-8 cannot encode"
    return None


def _read_messages(row: RawRow, columns: Columns) -> list[Message]:
    return messages_of(value_of(row, "messages", columns), "messages")


def _read_sharegpt(row: RawRow, columns: Columns) -> list[Message]:
    messages = messages_of(value_of(row, "conversations", columns), "conversations")
    if not messages or messages[0].role != "system":
        return [*system_of(row, columns), *messages]
    return messages


def _read_alpaca(row: RawRow, columns: Columns) -> list[Message]:
    messages = system_of(row, columns)
    history = row.get(columns.get("history", "history")) or ()
    if not is_list(history) or not all(is_list(pair) and len(pair) == 2 for pair in history):
        raise InvalidRow("`history` is not a list of pairs")
    for question, answer in history:
        messages.append(Message("user", text_of(question, "question")))
        messages.append(Message("assistant", text_of(answer, "answer")))
    instruction = text_of(value_of(row, "instruction", columns), "question")
    messages.append(Message("user", join_instruction_and_input(instruction, row, columns)))
    output = text_of(value_of(row, "output", columns), "answer")
    messages.append(Message("assistant", output))
    return messages


def join_instruction_and_input(
    instruction: str,
    row: RawRow,
    columns: Columns,
) -> str:
    """Returns an Alpaca row's instruction with its input after it."""
    value = row.get(columns.get("input", "input"))
    if value is None and "input" not in columns:
        value = row.get("context")
    parts = [instruction]
    if value is not None:
        parts.append(text_of(value, "input"))
    return "\n\n".join(part for part in parts if part.strip())


def _read_prompt_completion(row: RawRow, columns: Columns) -> list[Message]:
    messages: list[Message] = []
    for name, role, label in PROMPT_COMPLETION_PARTS:
        value = value_of(row, name, columns)
        if is_list(value):
            messages += messages_of(value, name)
        else:
            messages.append(Message(role, text_of(value, label)))
    return messages


def _read_question_answer(row: RawRow, columns: Columns) -> list[Message]:
    question = text_of(value_of(row, "question", columns), "question")
    answer = text_of(value_of(row, "answer", columns), "answer")
    return [Message("user", question), Message("assistant", answer)]


def _read_humaneval(row: RawRow, columns: Columns) -> list[Message]:
    """Returns the beginning of a function, and the rest of it as the answer."""
    prompt = text_of(value_of(row, "prompt", columns), "question")
    solution = text_of(value_of(row, "canonical_solution", columns), "answer")
    return [Message("user", prompt), Message("assistant", solution)]


def _read_mbpp(row: RawRow, columns: Columns) -> list[Message]:
    """Returns the task with its first test, because only the tests contain the name of the function, and the
    solution."""
    task = text_of(value_of(row, "text", columns), "question")
    tests = value_of(row, "test_list", columns)
    if not is_list(tests):
        raise InvalidRow("`test_list` is not a list of texts")
    if tests:
        task += f"\n\nYour code should pass tests like this one:\n{text_of(tests[0], 'test')}"
    solution = text_of(value_of(row, "code", columns), "answer")
    return [Message("user", task), Message("assistant", solution)]


@dataclass(frozen=True)
class RowFormat:
    """The columns that a format must have, each with its possible names (`columns` maps the first name), and the reader
    of its conversations. `bare_answers`: an answer that is one number is its own gold answer."""

    needed: tuple[tuple[str, ...], ...]
    read: Callable[[RawRow, Columns], list[Message]] | None = None
    bare_answers: bool = False


FORMATS = {
    "messages": RowFormat((("messages",),), _read_messages),
    "sharegpt": RowFormat((("conversations", "conversation"),), _read_sharegpt),
    "alpaca": RowFormat((("instruction",), ("output", "response")), _read_alpaca, bare_answers=True),
    "prompt_completion": RowFormat(
        (("prompt",), ("completion", "response")),
        _read_prompt_completion,
        bare_answers=True,
    ),
    "question_answer": RowFormat(
        (("question", "problem", "query"), ("answer", "solution", "generated_solution", "response")),
        _read_question_answer,
        bare_answers=True,
    ),
    "humaneval": RowFormat(
        (("prompt",), ("canonical_solution",), ("test",), ("entry_point",)),
        _read_humaneval,
    ),
    "mbpp": RowFormat((("text", "prompt"), ("code",), ("test_list",)), _read_mbpp),
    "preference": RowFormat((("chosen",), ("rejected",))),
    "text": RowFormat((("text",),)),
}
COLUMN_ALIASES = {
    aliases[0]: aliases
    for name, row_format in FORMATS.items()
    if name != "text"  # mbpp has a column of this name with other names for it
    for aliases in row_format.needed
}
"""The possible names of each of these columns."""


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
    role = _first_present(turn, "role", "from")
    if not isinstance(role, str):
        raise InvalidRow("a turn has no role")
    if role.lower() in TOOL_ROLES or turn.get("tool_calls"):
        raise InvalidRow("tool calls, which this kit does not train")
    if role.lower() not in ROLES:
        raise InvalidRow("a turn has an unknown role")
    content = _first_present(turn, "content", "value")
    if content is None:
        raise InvalidRow("a turn has no content")
    return Message(ROLES[role.lower()], text_of(content, "text of a turn"))


def _first_present(turn: RawRow, *keys: str) -> Any:
    """Returns the first value that is not null."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Returns the messages, after this system prompt if they have none."""
    if system and messages[0].role != "system":
        return (Message("system", system), *messages)
    return messages


def check_order(messages: Sequence[Message], require_answer: bool) -> tuple[Message, ...]:
    """Returns the messages in a valid order. Raises InvalidRow.

    Two messages of the user in a row are joined. Two of the assistant are a fault, because it is unknown which of them
    should end the turn.
    """
    merged: list[Message] = []
    for index, message in enumerate(messages):
        is_empty = not message.content.strip()
        if message.role == "system" and index:
            raise InvalidRow("a system turn that is not the first")
        if message.role == "system" and is_empty:
            continue
        if is_empty:
            raise InvalidRow("empty question" if message.role == "user" else "empty answer")
        if not merged or merged[-1].role != message.role:
            merged.append(message)
        elif message.role == "assistant":
            raise InvalidRow("two assistant turns in a row")
        else:
            merged[-1] = Message(message.role, f"{merged[-1].content}\n\n{message.content}")
    roles = [message.role for message in merged if message.role != "system"]
    if not roles:
        raise InvalidRow("no turns")
    if require_answer and "assistant" not in roles:
        raise InvalidRow("no assistant turn")
    if roles[0] == "assistant":
        raise InvalidRow("the first turn is the assistant's")
    if require_answer and roles[-1] != "assistant":
        raise InvalidRow("no answer: the last turn is the user's")
    return tuple(merged)
