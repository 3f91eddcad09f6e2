"""Sampling options of a chat, from command line options and from `/set`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from lowrank_tune.errors import UserError, did_you_mean
from lowrank_tune.generation.sampling_params import SamplingParams

BOUNDS: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, 100.0, "0 for greedy decoding, or more"),
    "top_p": (0.0, 1.0, "above 0, up to 1"),
    "top_k": (0, 10**9, "0 for all tokens, or a number of them"),
    "min_p": (0.0, 1.0, "from 0 to 1"),
    "max_new_tokens": (1, 10**9, "at least 1"),
    "seed": (0, 2**63 - 1, "0 or more"),
}


@dataclass(frozen=True)
class SamplingOptions:
    """The default is greedy, as for held-out questions in training. Raises UserError for values out of bounds."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high, words) in BOUNDS.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high) or (name == "top_p" and value == 0):
                raise UserError(f"{name}: {value} is not possible; {words}")

    def with_value(self, name: str, value: str) -> SamplingOptions:
        """Returns options with one value changed, given as text. Raises UserError."""
        names = {field.name for field in fields(self)}
        name = name.replace("-", "_").strip()
        if name not in names:
            raise UserError(
                f"there is no setting `{name}`{did_you_mean(name, sorted(names))} Settings: {', '.join(BOUNDS)}"
            )
        kind = type(getattr(self, name))
        try:
            return replace(self, **{name: kind(value)})
        except (ValueError, OverflowError) as error:
            expected = "a number" if kind is float else "a whole number"
            raise UserError(f"{name}: {value!r} is not {expected}; {BOUNDS[name][2]}") from error

    def sampling(
        self,
        stop_ids: frozenset[int],
        limit: int,
        seed: int,
    ) -> SamplingParams:
        """Returns the parameters of one answer of at most `limit` tokens."""
        return SamplingParams(
            limit,
            stop_ids,
            self.temperature,
            seed,
            self.top_k,
            self.top_p,
            self.min_p,
        )

    def describe(self, name: str) -> str:
        """Returns an option with its value, and whether it has an effect."""
        name = name.replace("-", "_")
        note = ""
        if self.temperature == 0 and name in ("top_p", "top_k", "min_p", "seed"):
            note = "; at temperature 0 it changes nothing"
        return f"{name} = {self._format_value(name)}{note}"

    def _format_value(self, name: str) -> str:
        value = getattr(self, name)
        if isinstance(value, float):
            return f"{value:g}"
        return str(value)

    def lines(self) -> list[str]:
        """Returns one line for each option, with its possible values."""
        return [f"{name} = {self._format_value(name)}  ({words})" for name, (_, _, words) in BOUNDS.items()]
