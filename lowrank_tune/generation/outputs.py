"""Outputs of the engine: completions, and tokens as they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Completion:
    """One completion of prompt number `prompt`. With `finish_reason` budget (the limit of the whole call) it has any
    number of tokens, possibly none."""

    prompt: int
    sample: int
    token_ids: list[int]
    """The end token included."""
    finish_reason: Literal["stop", "length", "budget"]
    logps: list[float] | None = None
    """Log-probs of the tokens, if the engine keeps them."""

    @property
    def content_ids(self) -> list[int]:
        """The tokens without the end token."""
        if self.finish_reason == "stop":
            return self.token_ids[:-1]
        return self.token_ids


@dataclass(frozen=True)
class Token:
    """A token as it is drawn: `token_id` of sample `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    token_id: int
