"""From the row of a data set to a conversation: a reader for each format, and a reason for every row that matches none.

The formats `preference` and `text` are detected here, and read in `preference_pairs.py` and `text_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowrank_tune.data.ground_truth import box_answer, extract_answer
from lowrank_tune.data.message import Message, MessageRole
from lowrank_tune.data.messages import (
    ChatMessages,
    check_order,
    messages_of,
    system_of,
    text_fault,
    with_system,
)
from lowrank_tune.data.row_values import (
    Columns,
    InvalidRow,
    RawRow,
    RawRowOrFault,
    RowOrFault,
    is_list,
    optional_text_of,
    text_of,
)
from lowrank_tune.data.scored_responses import has_scored_responses
from lowrank_tune.data.tool_calls import tools_of
from lowrank_tune.errors import UserError

__all__ = [
    "ChatMessages",
    "Columns",
    "Conversation",
    "FORMATS",
    "InvalidRow",
    "RawRow",
    "RawRowOrFault",
    "RowFormat",
    "RowOrFault",
    "box_final_answer",
    "detect_format",
    "join_instruction_and_input",
    "text_fault",
    "to_conversation",
    "value_of",
    "with_system",
]

PROMPT_COMPLETION_PARTS: tuple[tuple[str, MessageRole, str], ...] = (
    ("prompt", "user", "question"),
    ("completion", "assistant", "answer"),
)
"""Column, role and label in messages."""
EXAMPLE_COLUMNS = {"question": "problem", "answer": "solution"}


@dataclass(frozen=True)
class Conversation:
    """A system message or none, then user and assistant in turn, with the results of tools after the calls of the
    assistant; the last message is the assistant's. `ground_truth`: the gold answer. `tools`: the functions that the
    assistant may call, a JSON list as text; empty without any."""

    messages: tuple[Message, ...]
    ground_truth: str | None = None
    tools: str = ""

    @property
    def answer(self) -> str | None:
        """The text of the last message if it is the assistant's; empty if this only calls tools."""
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
    if has_scored_responses(row, columns or {}):
        return "preference"
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
        "learn from; expected `chosen` and `rejected`, and `prompt` unless both contain the whole conversation, or "
        "`prompt`, `responses` and `scores`: "
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
    user's, or the result of a tool."""
    if not isinstance(row, Mapping):
        raise InvalidRow("not an object with columns")
    row_format = FORMATS[format_name]
    assert row_format.read is not None, "`to_pair` reads pairs, and `text_of_row` plain text"
    messages = check_order(row_format.read(row, columns), require_answer)
    tools = ""
    if row_format.has_tools or "tools" in columns:
        tools = tools_of(row, columns)
    conversation = Conversation(messages, tools=tools)
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
    last = conversation.messages[-1]
    boxed = replace(last, content=box_answer(last.content))
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
    messages.append(_answer_message(output, row, columns))
    return messages


def _answer_message(
    text: str,
    row: RawRow,
    columns: Columns,
) -> Message:
    """Returns the answer of a row, with the reasoning that the row has in a column of its own."""
    reasoning = row.get(columns.get("reasoning_content", "reasoning_content"))
    return Message("assistant", text, optional_text_of(reasoning, "reasoning"))


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
        elif role == "assistant":
            answer = _answer_message(
                text_of(value, label),
                row,
                columns,
            )
            messages.append(answer)
        else:
            messages.append(Message(role, text_of(value, label)))
    return messages


def _read_question_answer(row: RawRow, columns: Columns) -> list[Message]:
    question = text_of(value_of(row, "question", columns), "question")
    answer = text_of(value_of(row, "answer", columns), "answer")
    return [
        Message("user", question),
        _answer_message(answer, row, columns),
    ]


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
    of its conversations. `bare_answers`: an answer that is one number is its own gold answer. `has_tools`: a column
    `tools` contains functions; in other formats it is read only if `columns` maps it, since it may mean anything."""

    needed: tuple[tuple[str, ...], ...]
    read: Callable[[RawRow, Columns], list[Message]] | None = None
    bare_answers: bool = False
    has_tools: bool = False


FORMATS = {
    "messages": RowFormat((("messages",),), _read_messages, has_tools=True),
    "sharegpt": RowFormat((("conversations", "conversation"),), _read_sharegpt, has_tools=True),
    "alpaca": RowFormat((("instruction",), ("output", "response")), _read_alpaca, bare_answers=True),
    "prompt_completion": RowFormat(
        (("prompt",), ("completion", "response")),
        _read_prompt_completion,
        bare_answers=True,
        has_tools=True,
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
