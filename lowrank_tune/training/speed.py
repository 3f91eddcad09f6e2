"""Compares the estimated speed of the update with the measured one, once in a session."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lowrank_tune.events import Emit, LogMessage, StepEnd
from lowrank_tune.training.run_totals import tokens_per_second

MEASURED_STEPS = 20
"""The first steps of a session, after which the comparison is made."""
COLLECTING_SECONDS = ("rollout_seconds", "reward_seconds")
"""Metrics of a step with the seconds that do not belong to the update."""


@dataclass
class SpeedComparison:
    """Receives the steps of a session. The first step, in which kernels are loaded, and steps that measure metrics are
    left out, except if all steps measure them."""

    estimated_tokens_per_second: float
    emit: Emit
    measured_tokens_per_second: float | None = None
    steps: list[StepEnd] = field(default_factory=list)

    def add(self, step: StepEnd) -> None:
        """Keeps a step. After the last one that is measured, logs the comparison."""
        if self.measured_tokens_per_second is not None:
            return
        self.steps.append(step)
        if len(self.steps) == MEASURED_STEPS:
            self.measured_tokens_per_second = self._measure()
            if self.to_dict():
                self.emit(LogMessage(message=self._message()))

    def to_dict(self) -> dict[str, float]:
        """Returns both speeds and their ratio for the summary; empty before the comparison, and without times."""
        measured = self.measured_tokens_per_second
        if measured is None or math.isnan(measured):
            return {}
        return {
            "estimated_tokens_per_second": round(self.estimated_tokens_per_second, 1),
            "measured_tokens_per_second": round(measured, 1),
            "ratio": round(measured / self.estimated_tokens_per_second, 3),
        }

    def _measure(self) -> float:
        later = self.steps[1:]
        plain = [step for step in later if not step.logged]
        tokens = 0
        seconds = 0.0
        for step in plain or later:
            tokens += step.tokens
            seconds += step.seconds - sum(step.stats.get(name, 0.0) for name in COLLECTING_SECONDS)
        return tokens_per_second(tokens, seconds)

    def _message(self) -> str:
        values = self.to_dict()
        return (
            f"speed of the update after {MEASURED_STEPS} steps: {values['measured_tokens_per_second']:,.0f} tokens/s "
            f"measured, {values['estimated_tokens_per_second']:,.0f} estimated (ratio {values['ratio']:.2f})"
        )
