"""Why a sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lowrank_tune.types import Sampling

Decode = Callable[[Sequence[int]], str]


class Stops:
    """The ends that a sampling names. Raises ValueError for stop strings that are empty or that nobody can read."""

    def __init__(self, sampling: Sampling, decode: Decode | None) -> None:
        if sampling.stop_strings and decode is None:
            raise ValueError("stop strings need a function that turns tokens into text: Engine(..., decode=...)")
        if not all(sampling.stop_strings):
            raise ValueError("a stop string is empty: every text holds it")
        self.ids, self.strings, self.limit, self.decode = (
            sampling.stop_ids,
            sampling.stop_strings,
            sampling.max_new_tokens,
            decode,
        )
        # A letter is at most four tokens of one byte; a few more, for a tail may begin within a letter and lose its
        # first space.
        self.tail = 4 * max(map(len, self.strings), default=0) + 8

    def finish(self, ids: Sequence[int]) -> Literal["stop", "length"] | None:
        """Whether a completion ends with its last token, and why."""
        if ids[-1] in self.ids or (self.strings and self._said(ids)):
            return "stop"
        return "length" if len(ids) >= self.limit else None

    def _said(self, ids: Sequence[int]) -> bool:
        assert self.decode is not None
        text = self.decode(ids[-self.tail :])
        return any(string in text for string in self.strings)
