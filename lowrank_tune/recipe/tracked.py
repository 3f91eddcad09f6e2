"""Rules about experiment trackers, of plain data like `rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.recipe.written import Finding, entries, written

FILED = ("wandb", "trackio", "mlflow")
"""Those that file runs under projects; TensorBoard's files lie in the run's folder."""


def idle(data: Any) -> Iterator[Finding]:
    """A project is for trackers that have such."""
    one = written(data, "train", "report_to")
    names = [one] if isinstance(one, str) else entries(data, "train", "report_to")
    if written(data, "train", "project") is not None and not any(name in FILED for name in names):
        yield (
            ("train", "project"),
            f"does nothing without `train.report_to`: {', '.join(FILED)} (TensorBoard's files lie in the run's folder)",
        )
