"""From the row of a data set to a conversation: five known shapes, and a reason for every row that fits none.

The sixth shape, `preference`, is found here and read in `preference_pairs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from lowrank_tune.data.ground_truth import extract_answer
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError

RawExample = Mapping[str, Any]
Turn = tuple[str, str]
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations", "conversation"),),
    "alpaca": (("instruction",), ("output", "response")),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "question_answer": (("question", "problem", "query"), ("answer", "solution", "generated_solution", "response")),
    "preference": (("chosen",), ("rejected",)),
}
"""The columns that a shape must have, each with the names it goes by; the first name is the one that `columns` maps."""
ROLES = {
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


class InvalidRow(Exception):
    """Why one row cannot be used. The reason is one of a few phrases, so that rows can be counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """A system turn or none, then user and assistant in turn; the assistant has the last word. `ground_truth`: the
    answer to check against."""

    messages: tuple[Message, ...]
    ground_truth: str | None = None


def detect_format(row: RawExample, columns: Mapping[str, str] | None = None, pairs: bool = False) -> str:
    """The shape of a row, by its columns. Columns that the user renamed count first.

    A row that has a target besides its pair (`output`, `messages`) is a pair only where `pairs` are wanted, and then
    nothing else is.
    """
    renamed = set(columns or ())
    present = {name for name, value in row.items() if value is not None} | renamed
    matching = [format_name for format_name, needed in FORMATS.items() if all(present & set(names) for names in needed)]
    if pairs:
        matching = [format_name for format_name in matching if format_name == "preference"]
    elif "preference" in matching:
        # beside a pair the conversation is its prompt, not a target
        matching = [format_name for format_name in matching if format_name != "sharegpt"]
    for format_name in matching:
        if renamed & {name for names in FORMATS[format_name] for name in names}:
            return format_name
    if matching:
        return matching[0]
    names = ", ".join(sorted(map(str, row))).encode("utf-8", "replace").decode()
    if pairs:
        raise UserError(
            f"the columns {names or '(none)'} are no preference pair, which `algorithm: reward` and `algorithm: dpo` "
            f"learn from; "
            "expected `chosen` and `rejected`, and `prompt` unless both hold the whole talk: "
            "name yours with `columns:`, as in `columns: {chosen: better, rejected: worse}`"
        )
    known_formats = "; ".join(
        f"{format_name} ({', '.join(names[0] for names in needed)})" for format_name, needed in FORMATS.items()
    )
    example = next((columns for columns in CODE_COLUMNS if {*columns.values()} <= {*row}), EXAMPLE_COLUMNS)
    pairs_of_names = ", ".join(f"{name}: {column}" for name, column in example.items())
    raise UserError(
        f"the columns {names or '(none)'} are no known shape; known are {known_formats}: "
        f"name yours with `columns:`, as in `columns: {{{pairs_of_names}}}`"
    )


EXAMPLE_COLUMNS = {"question": "problem", "answer": "solution"}
CODE_COLUMNS = ({"question": "text", "answer": "code"}, {"question": "prompt", "answer": "canonical_solution"})
"""The columns of MBPP and of HumanEval, for the example in a message."""


def to_conversation(
    row: RawExample,
    format_name: str,
    columns: Mapping[str, str],
    answer_rule: str = "auto",
    *,
    require_answer: bool = True,
) -> Conversation:
    """The conversation of a row; `InvalidRow` where it holds none. Without `require_answer` the last word may be the
    user's."""
    if not isinstance(row, Mapping):
        raise InvalidRow("not an object with columns")
    turns = _READERS[format_name](row, columns)
    messages = normalize_turns(turns, require_answer)
    answer = messages[-1].content if messages[-1].role == "assistant" else ""
    return Conversation(
        messages,
        extract_answer(
            row,
            columns,
            answer_rule,
            answer,
            accept_bare_number=format_name in ("question_answer", "alpaca", "prompt_completion"),
        ),
    )


def value_of(row: RawExample, format_name: str, name: str, columns: Mapping[str, str]) -> Any:
    """The value of a column that the shape must have, under the name that the user mapped or any that it goes by."""
    aliases = next(names for names in FORMATS[format_name] if names[0] == name)
    for alias in aliases:
        if alias in columns:
            aliases = (columns[alias],)
            break
    for alias in aliases:
        if row.get(alias) is not None:
            return row[alias]
    if any(alias in row for alias in aliases):
        raise InvalidRow(f"column `{next(alias for alias in aliases if alias in row)}` is null")
    raise InvalidRow(f"no column `{aliases[0]}`")


def text_of(value: Any, label: str) -> str:
    """A text, or a number as text: 51.0 is "51"."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**400:
        text = str(value)
    elif isinstance(value, float) and math.isfinite(value):
        if value.is_integer() and abs(value) < 1e15:
            text = str(int(value))
        else:
            text = repr(value)
    elif (
        isinstance(value, Sequence)
        and value
        and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value)
    ):
        text = "".join(part["text"] for part in value)  # the content parts that some multi-modal libraries write
    else:
        raise InvalidRow(f"the {label} is no text")
    if not is_text(text):
        raise InvalidRow(f"the {label} holds half of a surrogate pair, which is no character")
    return text


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON can smuggle lone surrogates into a string."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_messages(row: RawExample, columns: Mapping[str, str]) -> list[Turn]:
    return turns_of(value_of(row, "messages", "messages", columns), "messages")


def _read_sharegpt(row: RawExample, columns: Mapping[str, str]) -> list[Turn]:
    turns = turns_of(value_of(row, "sharegpt", "conversations", columns), "conversations")
    if not turns or turns[0][0] != "system":
        return [*system_of(row, columns), *turns]
    return turns


def _read_alpaca(row: RawExample, columns: Mapping[str, str]) -> list[Turn]:
    turns = system_of(row, columns)
    history = row.get(columns.get("history", "history")) or ()
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise InvalidRow("`history` is no list of pairs")
    for pair in history:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise InvalidRow("`history` is no list of pairs")
        turns += [("user", text_of(pair[0], "question")), ("assistant", text_of(pair[1], "answer"))]
    question = join_instruction_and_input(
        text_of(value_of(row, "alpaca", "instruction", columns), "question"),
        row,
        columns,
    )
    return [*turns, ("user", question), ("assistant", text_of(value_of(row, "alpaca", "output", columns), "answer"))]


def join_instruction_and_input(question: str, row: RawExample, columns: Mapping[str, str]) -> str:
    """An Alpaca row's instruction with its input behind it."""
    more = row.get(columns.get("input", "input"))
    if more is None and "input" not in columns:
        more = row.get("context")
    more = text_of(more, "input") if more is not None else ""
    return "\n\n".join(part for part in (question, more) if part.strip())


def _read_pair(row: RawExample, columns: Mapping[str, str]) -> list[Turn]:
    turns: list[Turn] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = value_of(row, "prompt_completion", name, columns)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        turns += (
            turns_of(value, name) if is_list else [(role, text_of(value, "question" if role == "user" else "answer"))]
        )
    return turns


def _read_question(row: RawExample, columns: Mapping[str, str]) -> list[Turn]:
    question = text_of(value_of(row, "question_answer", "question", columns), "question")
    return [("user", question), ("assistant", text_of(value_of(row, "question_answer", "answer", columns), "answer"))]


_READERS: dict[str, Callable[[RawExample, Mapping[str, str]], list[Turn]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_pair,
    "question_answer": _read_question,
}


def system_of(row: RawExample, columns: Mapping[str, str]) -> list[Turn]:
    """The system turn of a row that keeps it in a column; else none."""
    value = row.get(columns.get("system", "system"))
    if value is None:
        return []
    return [("system", text_of(value, "system prompt"))]


def turns_of(value: Any, name: str) -> list[Turn]:
    """Role and text of every turn of a list, in the kit's names of the roles."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidRow(f"`{name}` is no list of turns")
    return [turn_of(turn) for turn in value]


def turn_of(turn: Any) -> Turn:
    """The same of one turn."""
    if not isinstance(turn, Mapping):
        raise InvalidRow("a turn is no object")
    role = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    if not isinstance(role, str):
        raise InvalidRow("a turn has no role")
    if role.lower() in TOOL_ROLES or turn.get("tool_calls"):
        raise InvalidRow("tool calls, which this kit does not train")
    if role.lower() not in ROLES:
        raise InvalidRow("a turn has an unknown role")
    content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
    if content is None:
        raise InvalidRow("a turn has no content")
    return ROLES[role.lower()], text_of(content, "text of a turn")


def with_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """The turns, behind this system prompt where they bring none."""
    if system and messages[0].role != "system":
        return (Message("system", system), *messages)
    return messages


def normalize_turns(turns: Sequence[Turn], require_answer: bool) -> tuple[Message, ...]:
    """Checks the order of the turns. A person who writes twice in a row is joined; an assistant who does is a fault:
    which end is right?"""
    merged: list[Turn] = []
    for index, (role, content) in enumerate(turns):
        if role == "system":
            if index:
                raise InvalidRow("a system turn that is not the first")
            if not content.strip():
                continue
        elif not content.strip():
            raise InvalidRow("empty question" if role == "user" else "empty answer")
        if merged and merged[-1][0] == role:
            if role == "assistant":
                raise InvalidRow("two assistant turns in a row")
            merged[-1] = (role, f"{merged[-1][1]}\n\n{content}")
        else:
            merged.append((role, content))
    roles = [role for role, _ in merged if role != "system"]
    if not roles:
        raise InvalidRow("no turns")
    if require_answer and "assistant" not in roles:
        raise InvalidRow("no assistant turn")
    if roles[0] == "assistant":
        raise InvalidRow("the assistant speaks first")
    if require_answer and roles[-1] != "assistant":
        raise InvalidRow("no answer: the user has the last word")
    return tuple(Message(cast(Literal["system", "user", "assistant"], role), content) for role, content in merged)
