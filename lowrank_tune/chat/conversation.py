"""A conversation in which two variants may answer: what was asked, what each said, what the model hears of it, and the
rows that it leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError

SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class ChatAnswer:
    """What a variant said, and whether it came to an end of its own."""

    text: str
    ended: bool


@dataclass
class Exchange:
    """A question and its answers by variant; `attempt` counts how often it was asked."""

    question: str
    answers: dict[str, ChatAnswer] = field(default_factory=dict)
    attempt: int = 0

    def answer_for(self, variant: str) -> ChatAnswer:
        """The variant's own answer; the other one's where it was not asked."""
        return self.answers.get(variant) or next(iter(self.answers.values()))


@dataclass(frozen=True)
class TruncatedConversation:
    """What the model reads: ids, how many of the oldest exchanges are not among them, and how many tokens an answer may
    have."""

    input_ids: list[int]
    forgotten: int
    limit: int


@dataclass
class Conversation:
    """The whole conversation. Each variant reads its own answers, and the other's only where it has none."""

    system_prompt: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, variant: str, start_index: int = 0, end: int | None = None) -> list[Message]:
        """The answered exchanges from `start_index` to before `end`, behind the system prompt."""
        if self.system_prompt:
            history = [Message("system", self.system_prompt)]
        else:
            history = []
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
        """Exchange `number`'s prompt. Where the base has too few positions, the oldest exchanges are left out until an
        answer of `max_new_tokens` has room, or one of a quarter of all positions. Raises UserError where the question
        alone is too long."""
        if positions is None:
            needed = max_new_tokens
        else:
            needed = min(max_new_tokens, max(1, positions // 4))
        for start in range(number + 1):
            ids = template.prompt([*self.messages(variant, start, number), Message("user", question)])
            room = max_new_tokens if positions is None else positions - len(ids)
            if room >= needed:
                break
        if room < 1:
            raise UserError(
                f"this takes {len(ids):,} tokens and the base reads at most {positions:,}: shorten the question"
                + (" or the system prompt" if self.system_prompt else "")
            )
        return TruncatedConversation(ids, start, min(max_new_tokens, room))

    def row(self, variant: str) -> tuple[list[Message], int]:
        """The conversation as the variant had it, up to the first answer that was cut off (a row would teach to stop
        there) or is empty, and how many exchanges are left out."""
        count = len(self.exchanges)
        whole = next(
            (number for number in range(count) if not _is_trainable(self.exchanges[number].answer_for(variant))), count
        )
        return self.messages(variant, 0, whole), count - whole


def _is_trainable(answer: ChatAnswer) -> bool:
    return answer.ended and bool(answer.text.strip())


def append_row(file: Path, messages: Sequence[Message]) -> None:
    """Adds a row of the shape `messages` to a file of JSON lines, new or not. Raises UserError; then the file is as it
    was."""
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"{file}: rows are written as JSON lines; name it {file.name or 'chat'}.jsonl")
    line = json.dumps(
        {"messages": [{"role": message.role, "content": message.content} for message in messages]}, ensure_ascii=False
    )
    try:
        separator = _missing_newline(file)
        with file.open("ab") as opened:
            opened.write(f"{separator}{line}\n".encode())
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error


def _missing_newline(file: Path) -> str:
    """What must stand before the next line. Raises UserError for a file of something else."""
    if not file.exists():
        return ""
    with file.open("rb") as opened:
        first = opened.readline()
        opened.seek(0, 2)
        size = opened.tell()
        opened.seek(max(0, size - 1))
        last = opened.read(1)
    try:
        if first.strip() and not isinstance(json.loads(first), dict):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{file}: is there already and holds no JSON lines; name another file") from error
    return "" if last in (b"", b"\n") else "\n"
