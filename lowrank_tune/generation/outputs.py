"""Outputs of the engine: completions, and tokens as they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Completion:
    """One completion of prompt number `prompt`: ids with the stop token, their log-probs where the engine has them, and
    why it ended.

    Ended by the budget of the whole call it may hold any number of tokens, none too.
    """

    prompt: int
    sample: int
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "budget"]
    logps: list[float] | None = None


@dataclass(frozen=True)
class Token:
    """A token as it is drawn: `token_id` of sample `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    token_id: int
