"""Held-out measurements: rows, pairs, questions with a gold answer, and files of responses."""

from lowrank_tune.evaluate.questions import Answer, Question, answer, is_exact, measure, questions_in, questions_of
from lowrank_tune.evaluate.responses import Response, score_file
from lowrank_tune.evaluate.rows import PairScores, score_pairs, validate

__all__ = [
    "Answer",
    "PairScores",
    "Question",
    "Response",
    "answer",
    "is_exact",
    "measure",
    "questions_in",
    "questions_of",
    "score_file",
    "score_pairs",
    "validate",
]
