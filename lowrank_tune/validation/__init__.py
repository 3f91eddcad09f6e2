"""Held-out measurements: rows, pairs, questions with a gold answer, and files of responses."""

from lowrank_tune.validation.heldout import (
    HeldoutAnswer,
    HeldoutQuestion,
    compute_metrics,
    generate_answers,
    is_exact,
    render_questions,
    select_questions,
)
from lowrank_tune.validation.score_file import ScoredResponse, score_file
from lowrank_tune.validation.validate import PairScores, score_pairs, validate

__all__ = [
    "HeldoutAnswer",
    "PairScores",
    "HeldoutQuestion",
    "ScoredResponse",
    "generate_answers",
    "is_exact",
    "compute_metrics",
    "select_questions",
    "render_questions",
    "score_file",
    "score_pairs",
    "validate",
]
