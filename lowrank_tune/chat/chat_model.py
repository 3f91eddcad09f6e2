"""The loaded model of a chat, with adapters off or on, and an answer as a stream of text."""

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
    """A base with its roles.

    `tuned` is True if there are adapters; `positions` is the context length of the base, None without a limit.
    """

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
    """One answer as a stream of text: iterating yields a piece for each token, which can be empty; `close` stops it.

    `finish_reason` is `stop`, `length`, `turn` (the text began another turn), or empty while the answer runs and after
    it was stopped. `text` is the text so far.
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
        self._stream = Engine(
            chat_model.roles,
            ROLE[variant],
            slots=1,
        ).stream([input_ids], 1, sampling)

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
        """Stops the answer. Can be called twice."""
        self._stream.close()

    @property
    def text(self) -> str:
        return self._decoder.text

    @property
    def ended(self) -> bool:
        """Whether the model ended the answer itself."""
        return self.finish_reason in ("stop", "turn")
