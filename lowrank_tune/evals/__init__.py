"""Evaluations of what was trained: base and tuned voices side by side from the same weights, every figure with its
interval."""

from lowrank_tune.evals.evaluation import Evaluation, Options, evaluate, has_figures
from lowrank_tune.evals.record import EVALS, Figure, Record, append_record, read_records, to_record

__all__ = [
    "EVALS",
    "Evaluation",
    "Figure",
    "Options",
    "Record",
    "append_record",
    "evaluate",
    "has_figures",
    "read_records",
    "to_record",
]
