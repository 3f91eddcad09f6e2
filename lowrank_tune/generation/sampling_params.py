"""Sampling parameters, named as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. temperature 0 is greedy. The stop ids end a completion and belong to it, as does the token that
    completes a stop string.

    top_k (0: all), top_p (1: all) and min_p (0: all) narrow the distribution, in this order, for evaluation and chat.
    `budget` bounds the tokens of a whole call of the engine.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    budget: int | None = None
