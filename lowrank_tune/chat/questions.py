"""Questions of a file for `chat --jsonl`: a line is plain text or a JSON object, and a conversation of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from lowrank_tune.chat.commands import Command, parse
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.json_files import parse_json
from lowrank_tune.ui.terminal.prompt import PipedInput

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Question:
    """The messages up to an answer. `line` is its number in the input; `id` is what the object of the line contains as
    `id`."""

    messages: Sequence[Message]
    line: int = 0
    id: Any = None

    @property
    def text(self) -> str:
        """The last message, which is answered."""
        return self.messages[-1].content


def read_questions(source: PipedInput) -> Iterator[Question]:
    """Yields the questions of the standard input. Raises UserError with the line of a faulty one."""
    while (line := source.read()) is not None:
        try:
            yield parse_question(line, source.line)
        except UserError as error:
            raise UserError(f"line {source.line}: {error}") from error


def parse_question(line: str, number: int = 0) -> Question:
    """Returns the question in a line: a text, or an object with `prompt` or `messages`. Raises UserError."""
    if line.lstrip().startswith("{"):
        return _from_object(_read_object(line), number)
    text = parse(line)
    if isinstance(text, Command):
        raise UserError(
            f"{text.name} is a command, and with --jsonl each line is a conversation of its own; a question that "
            "begins with a slash is written //..."
        )
    return Question([Message("user", text)], number)


def _read_object(line: str) -> Mapping[str, Any]:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise UserError(
            f'begins with {{ and is not a JSON object ({error}); write the question as {{"prompt": ...}}'
        ) from error
    assert isinstance(value, dict), "JSON that begins with { is an object"
    return value


def _from_object(value: Mapping[str, Any], number: int) -> Question:
    prompt = value.get("prompt")
    messages = value.get("messages")
    if (prompt is None) == (messages is None):
        raise UserError("an object needs either `prompt` or `messages`")
    if messages is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("`prompt` is not a text")
        return Question([Message("user", prompt)], number, value.get("id"))
    return Question(_messages(messages), number, value.get("id"))


def _messages(listed: Any) -> list[Message]:
    messages = []
    for entry in listed if isinstance(listed, list) else []:
        role = entry.get("role") if isinstance(entry, dict) else None
        content = entry.get("content") if isinstance(entry, dict) else None
        if not _is_role(role) or not isinstance(content, str):
            raise UserError(f"each of `messages` needs a `role` ({', '.join(ROLES)}) and a text as `content`")
        messages.append(Message(role, content))
    if not messages or messages[-1].role != "user":
        raise UserError("`messages` is not a list that ends with a message of the user")
    return messages


def _is_role(value: Any) -> TypeGuard[Literal["system", "user", "assistant"]]:
    return value in ROLES
