"""Who speaks: one base in memory, with the adapters off or on, and an answer as it is drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowrank_tune.chat.pieces import Pieces
from lowrank_tune.data import Template
from lowrank_tune.errors import OutOfMemory
from lowrank_tune.model.roles import Roles
from lowrank_tune.rollout import Engine
from lowrank_tune.types import Completion, Sampling

Voice = Literal["base", "tuned"]
ROLE: dict[Voice, str] = {"base": "base", "tuned": "policy"}


@dataclass(frozen=True)
class Speaker:
    """A base with its roles. `tuned`: there are adapters. `positions`: tokens that the base can read, None where it
    names no limit."""

    roles: Roles
    template: Template
    stop_ids: frozenset[int]
    positions: int | None
    tuned: bool
    system: str | None
    """The system prompt that the run trained with."""

    @property
    def voices(self) -> tuple[Voice, ...]:
        return ("base", "tuned") if self.tuned else ("base",)


class Answering:
    """One answer while it is drawn. Iterate for its pieces, an empty one where a token completes none; `close` stops
    it.

    `finish` is `stop`, `length`, `turn` (the text began another turn), or empty while it runs and when it was stopped.
    `text` is what was said so far.
    """

    def __init__(self, speaker: Speaker, voice: Voice, ids: Sequence[int], sampling: Sampling) -> None:
        self.voice, self.finish, self.tokens, self.seconds = voice, "", 0, 0.0
        self._stop_ids = sampling.stop_ids
        self._pieces = Pieces(speaker.template.decode, speaker.template.turn_marks)
        self._stream = Engine(speaker.roles, ROLE[voice], slots=1).stream([ids], 1, sampling)

    def __iter__(self) -> Iterator[str]:
        begun = time.perf_counter()
        try:
            for told in self._stream:
                self.seconds = time.perf_counter() - begun
                if isinstance(told, Completion):
                    self.finish = told.finish
                    break
                self.tokens += 1
                if told.id in self._stop_ids:
                    continue
                yield self._pieces.add(told.id)
                if self._pieces.turned:
                    self.finish = "turn"
                    return
            yield self._pieces.rest()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory("out of memory: `/reset` the conversation, or `/set max_new_tokens` to fewer") from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends it where it is. Safe to call twice."""
        self._stream.close()

    @property
    def text(self) -> str:
        return self._pieces.text

    @property
    def ended(self) -> bool:
        """Whether it came to an end of its own."""
        return self.finish in ("stop", "turn")
