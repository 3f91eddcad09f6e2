"""Evaluation of trained models: base and tuned variants over the same weights, with confidence intervals; answers and
losses during training; and scores of files."""

from lowrank_tune.evaluation.evaluation import Evaluation, evaluate, has_metrics
from lowrank_tune.evaluation.options import Options
from lowrank_tune.evaluation.responses import ResponseItem
from lowrank_tune.evaluation.results import (
    EVALS,
    EvalRecord,
    MetricValue,
    append_record,
    parse_record,
    read_records,
)
from lowrank_tune.evaluation.scoring import (
    CompletionScores,
    ScoredResponse,
    score_completions,
    score_file,
)

__all__ = [
    "EVALS",
    "CompletionScores",
    "Evaluation",
    "EvalRecord",
    "MetricValue",
    "Options",
    "ResponseItem",
    "ScoredResponse",
    "append_record",
    "evaluate",
    "has_metrics",
    "parse_record",
    "read_records",
    "score_completions",
    "score_file",
]
