"""Why a sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lowrank_tune.generation.sampling_params import SamplingParams

Decode = Callable[[Sequence[int]], str]


class StoppingCriteria:
    """The stop ids, stop strings and length limit of a sampling. Raises ValueError for an empty stop string, and for
    stop strings without `decode`."""

    def __init__(
        self,
        sampling: SamplingParams,
        decode: Decode | None,
    ) -> None:
        stop_strings = sampling.stop_strings
        if stop_strings and decode is None:
            raise ValueError("stop strings need a function that turns tokens into text: Engine(..., decode=...)")
        if not all(stop_strings):
            raise ValueError("a stop string is empty: every text contains it")
        self.stop_token_ids = sampling.stop_ids
        self.stop_strings = stop_strings
        self.max_new_tokens = sampling.max_new_tokens
        self.decode = decode
        # A character has at most four tokens of one byte each. A few more, because the tail may begin within a
        # character, and decoding may drop its first space.
        self.tail_tokens = 4 * max(map(len, stop_strings), default=0) + 8

    def finish_reason(self, token_ids: Sequence[int]) -> Literal["stop", "length"] | None:
        """Returns why a completion ends with its last token, or None if it goes on."""
        if token_ids[-1] in self.stop_token_ids or self._has_stop_string(token_ids):
            return "stop"
        if len(token_ids) >= self.max_new_tokens:
            return "length"
        return None

    def _has_stop_string(self, token_ids: Sequence[int]) -> bool:
        if self.decode is None or not self.stop_strings:
            return False
        text = self.decode(token_ids[-self.tail_tokens :])
        return any(string in text for string in self.stop_strings)
