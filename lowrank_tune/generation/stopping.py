"""Why a sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lowrank_tune.generation.sampling_params import SamplingParams

Decode = Callable[[Sequence[int]], str]


class StoppingCriteria:
    """The ends that a sampling names. Raises ValueError for stop strings that are empty or that nobody can read."""

    def __init__(self, sampling: SamplingParams, decode: Decode | None) -> None:
        if sampling.stop_strings and decode is None:
            raise ValueError("stop strings need a function that turns tokens into text: Engine(..., decode=...)")
        if not all(sampling.stop_strings):
            raise ValueError("a stop string is empty: every text holds it")
        self.stop_token_ids = sampling.stop_ids
        self.stop_strings = sampling.stop_strings
        self.max_new_tokens = sampling.max_new_tokens
        self.decode = decode
        # A letter is at most four tokens of one byte; a few more, for a tail may begin within a letter and lose its
        # first space.
        self.tail_tokens = 4 * max(map(len, self.stop_strings), default=0) + 8

    def finish_reason(self, token_ids: Sequence[int]) -> Literal["stop", "length"] | None:
        """Whether a completion ends with its last token, and why."""
        if token_ids[-1] in self.stop_token_ids or (self.stop_strings and self._has_stop_string(token_ids)):
            return "stop"
        if len(token_ids) >= self.max_new_tokens:
            return "length"
        return None

    def _has_stop_string(self, token_ids: Sequence[int]) -> bool:
        assert self.decode is not None
        text = self.decode(token_ids[-self.tail_tokens :])
        return any(string in text for string in self.stop_strings)
