"""Rules about experiment trackers, of plain data like `rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_tune.config.raw_settings import Finding, entries, get_raw

PROJECT_TRACKERS = ("wandb", "trackio", "mlflow")
"""Those that file runs under projects; TensorBoard's files lie in the run's folder."""


def unused_settings(data: Any) -> Iterator[Finding]:
    """A project is for trackers that have such."""
    report_to = get_raw(data, "train", "report_to")
    if isinstance(report_to, str):
        names = [report_to]
    else:
        names = entries(data, "train", "report_to")
    if get_raw(data, "train", "project") is not None and not any(name in PROJECT_TRACKERS for name in names):
        yield (
            ("train", "project"),
            f"does nothing without `train.report_to`: {', '.join(PROJECT_TRACKERS)} (TensorBoard's files lie in the "
            "run's folder)",
        )
