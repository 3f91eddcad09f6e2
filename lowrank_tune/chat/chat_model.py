"""Who speaks: one base in memory, with the adapters off or on, and an answer as it is drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowrank_tune.chat.streaming_decoder import IncrementalDecoder
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import OutOfMemory
from lowrank_tune.generation import Engine
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles

Variant = Literal["base", "tuned"]
ROLE: dict[Variant, str] = {"base": "base", "tuned": "policy"}


@dataclass(frozen=True)
class ChatModel:
    """A base with its roles. `tuned`: there are adapters. `positions`: tokens that the base can read, None where it
    names no limit."""

    roles: Roles
    template: ChatTemplate
    stop_ids: frozenset[int]
    positions: int | None
    tuned: bool
    system_prompt: str | None
    """The system prompt that the run trained with."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        return ("base", "tuned") if self.tuned else ("base",)


class AnswerStream:
    """One answer while it is drawn. Iterate for its pieces, an empty one where a token completes none; `close` stops
    it.

    `finish_reason` is `stop`, `length`, `turn` (the text began another turn), or empty while it runs and when it was
    stopped. `text` is what was said so far.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        variant: Variant,
        input_ids: Sequence[int],
        sampling: SamplingParams,
    ) -> None:
        self.variant = variant
        self.finish_reason = ""
        self.tokens = 0
        self.seconds = 0.0
        self._stop_ids = sampling.stop_ids
        template = chat_model.template
        self._decoder = IncrementalDecoder(template.decode, template.turn_delimiters, template.is_byte)
        self._stream = Engine(chat_model.roles, ROLE[variant], slots=1).stream([input_ids], 1, sampling)

    def __iter__(self) -> Iterator[str]:
        started = time.perf_counter()
        try:
            for item in self._stream:
                self.seconds = time.perf_counter() - started
                if isinstance(item, Completion):
                    self.finish_reason = item.finish_reason
                    break
                self.tokens += 1
                if item.token_id in self._stop_ids:
                    continue
                yield self._decoder.add(item.token_id)
                if self._decoder.turned:
                    self.finish_reason = "turn"
                    return
            yield self._decoder.flush()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory("out of memory: `/reset` the conversation, or `/set max_new_tokens` to fewer") from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends it where it is. Safe to call twice."""
        self._stream.close()

    @property
    def text(self) -> str:
        return self._decoder.text

    @property
    def ended(self) -> bool:
        """Whether it came to an end of its own."""
        return self.finish_reason in ("stop", "turn")
