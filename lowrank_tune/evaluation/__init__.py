"""Evaluations of what was trained: base and tuned variants side by side from the same weights, every figure with its
interval."""

from lowrank_tune.evaluation.evaluation import Evaluation, Options, evaluate, has_metrics
from lowrank_tune.evaluation.response_scores import ScoredResponse, score_file
from lowrank_tune.evaluation.results import EVALS, EvalRecord, MetricValue, append_record, parse_record, read_records

__all__ = [
    "EVALS",
    "Evaluation",
    "MetricValue",
    "Options",
    "EvalRecord",
    "ScoredResponse",
    "append_record",
    "evaluate",
    "has_metrics",
    "read_records",
    "parse_record",
    "score_file",
]
