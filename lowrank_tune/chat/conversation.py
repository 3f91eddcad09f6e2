"""A conversation with answers of two variants: exchanges, the prompt for a variant, and training rows made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.json_files import parse_json

SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class ChatAnswer:
    """The answer of a variant, and whether the model ended it itself."""

    text: str
    ended: bool


@dataclass
class Exchange:
    """A question and its answers by variant; `attempt` is the number of retries."""

    question: str
    answers: dict[str, ChatAnswer] = field(default_factory=dict)
    attempt: int = 0

    def answer_for(self, variant: str) -> ChatAnswer:
        """Returns the variant's own answer, or the other one's without its own."""
        return self.answers.get(variant) or next(iter(self.answers.values()))


@dataclass(frozen=True)
class TruncatedConversation:
    """A prompt: its ids, the number of oldest exchanges that are left out, and the maximum length of the answer."""

    input_ids: list[int]
    forgotten: int
    limit: int


@dataclass
class Conversation:
    """The conversation. A variant reads its own answers, and those of the other one for questions without its own."""

    system_prompt: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(
        self,
        variant: str,
        start_index: int = 0,
        end: int | None = None,
    ) -> list[Message]:
        """Returns the system prompt and the answered exchanges from `start_index` to before `end`."""
        history: list[Message] = []
        if self.system_prompt:
            history.append(Message("system", self.system_prompt))
        for exchange in self.exchanges[start_index:end]:
            history += [Message("user", exchange.question), Message("assistant", exchange.answer_for(variant).text)]
        return history

    def truncate(
        self,
        variant: str,
        number: int,
        question: str,
        template: ChatTemplate,
        positions: int | None,
        max_new_tokens: int,
    ) -> TruncatedConversation:
        """Returns the prompt of exchange `number`.

        If the context of the base is too short, the oldest exchanges are left out until an answer of `max_new_tokens`
        has room, or of a quarter of the context. Raises UserError if the question alone is too long, or if the
        template refuses it.
        """
        if positions is None:
            needed = max_new_tokens
        else:
            needed = min(max_new_tokens, max(1, positions // 4))
        for start in range(number + 1):
            ids = prompt_ids(template, [*self.messages(variant, start, number), Message("user", question)])
            room = max_new_tokens if positions is None else positions - len(ids)
            if room >= needed:
                break
        if room < 1:
            parts = "the question or the system prompt" if self.system_prompt else "the question"
            raise UserError(f"this takes {len(ids):,} tokens and the base reads at most {positions:,}: shorten {parts}")
        return TruncatedConversation(ids, start, min(max_new_tokens, room))

    def row(self, variant: str) -> tuple[list[Message], int]:
        """Returns the conversation of a variant as a training row, and the number of exchanges that are left out.

        The row ends before the first answer that is empty or was cut off: it would train the model to stop there.
        """
        complete = 0
        for exchange in self.exchanges:
            if not _is_trainable(exchange.answer_for(variant)):
                break
            complete += 1
        return self.messages(variant, 0, complete), len(self.exchanges) - complete


def _is_trainable(answer: ChatAnswer) -> bool:
    return answer.ended and bool(answer.text.strip())


def prompt_ids(template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Returns the ids up to the answer. Raises UserError if the template refuses the messages."""
    try:
        return template.prompt(messages)
    except InvalidRow as error:
        raise UserError(f"this cannot be rendered: {error.reason}") from error


def append_row(file: Path, messages: Sequence[Message]) -> None:
    """Appends a row of the format `messages` to a JSON lines file. Raises UserError and leaves the file unchanged."""
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: rows are written as JSON lines; name it {file.name or 'chat'}.jsonl")
    row = [{"role": message.role, "content": message.content} for message in messages]
    line = json.dumps({"messages": row}, ensure_ascii=False)
    try:
        separator = _missing_newline(file)
        with file.open("ab") as opened:
            opened.write(f"{separator}{line}\n".encode())
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error


def _missing_newline(file: Path) -> str:
    """Returns the line break that the file lacks at its end. Raises UserError if it is not a JSON lines file."""
    if not file.exists():
        return ""
    with file.open("rb") as opened:
        first = opened.readline()
        opened.seek(0, 2)
        size = opened.tell()
        opened.seek(max(0, size - 1))
        last = opened.read(1)
    try:
        if first.strip() and not isinstance(parse_json(first), dict):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{file}: exists and is not a JSON lines file; name another file") from error
    return "" if last in (b"", b"\n") else "\n"
