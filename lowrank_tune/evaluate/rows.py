"""Measurements on held-out rows: what an algorithm is judged by, and how far its scores of preference pairs can be believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_tune.data import TokenStore
from lowrank_tune.data.budget import by_tokens
from lowrank_tune.events import Emit, Progress
from lowrank_tune.maths import calibration_error, correlation, reliability, share_right
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Algorithm, Batch, Stats, add_stats, to_floats

TOLD = 20  # times that a long job tells how far it is
SHOWN_SCORES = 2000  # pairs whose scores are kept for the report
Collated = Callable[[Sequence[int]], Batch]


class PairAlgorithm(Protocol):
    """An algorithm that has an opinion on whole rows: a learned score, or DPO's implicit reward."""

    def scores(self, micro: Batch) -> Tensor: ...


@dataclass(frozen=True)
class PairScores:
    """Scores (P,) and tokens (P,) of the chosen and the rejected answers of P pairs."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def figures(self) -> dict[str, float]:
        """How far the scores can be believed, and whether they follow the length of an answer."""
        difference = self.chosen - self.rejected
        longer = (self.chosen_tokens - self.rejected_tokens).sign()
        told = longer != 0
        scores, tokens = torch.cat([self.chosen, self.rejected]), torch.cat([self.chosen_tokens, self.rejected_tokens])
        return {
            "accuracy": share_right(difference).value, "margin": float(difference.double().mean()),
            "calibration_error": calibration_error(reliability(difference)), "length_correlation": correlation(scores, tokens),
            "prefers_longer": float(((difference * longer)[told] > 0).double().mean()) if bool(told.any()) else math.nan}  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the report: figures, the reliability diagram, and the scores of the first pairs."""
        sides = {"chosen": self.chosen, "rejected": self.rejected, "chosen_tokens": self.chosen_tokens, "rejected_tokens": self.rejected_tokens}
        found = reliability(self.chosen - self.rejected)
        bins = [{"confidence": confidence, "right": right, "pairs": count} for confidence, right, count in found]
        return {"version": 1, "pairs": len(self.chosen), "figures": self.figures(), "reliability": bins,
                **{name: [round(value, 5) for value in side[:SHOWN_SCORES].tolist()] for name, side in sides.items()}}  # fmt: skip


def validate(algorithm: Algorithm, roles: Roles, rows: TokenStore, collated: Collated, micro_tokens: int, emit: Emit) -> dict[str, float]:
    """What the algorithm measures on held-out rows, means over all of them; dropout off."""
    stats: Stats = {}
    for batch, _ in held_out_batches(roles, rows, collated, micro_tokens, "validating", emit):
        with roles.quiet():
            add_stats(stats, algorithm.measure(batch))
    return to_floats(stats)


def score_pairs(algorithm: PairAlgorithm, roles: Roles, rows: TokenStore, collated: Collated, micro_tokens: int, emit: Emit) -> PairScores:
    """What the algorithm thinks of both sides of every pair, and how long they are."""
    scores, lengths = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.long)
    for batch, places in held_out_batches(roles, rows, collated, micro_tokens, "scoring held-out pairs", emit):
        with roles.quiet():
            scores[places] = algorithm.scores(batch).float().cpu()
        lengths[places] = batch.scored.sum(dim=1).cpu()
    return PairScores(scores[::2], scores[1::2], lengths[::2], lengths[1::2])


def held_out_batches(roles: Roles, rows: TokenStore, collated: Collated, micro_tokens: int, what: str,
                     emit: Emit) -> Iterator[tuple[Batch, Tensor]]:  # fmt: skip
    """All units of a store in batches of similar length, longest first, on the device of the base; and which rows of the store they are."""
    done = 0
    for part in by_tokens(rows, micro_tokens):
        yield collated(part).to(roles.base.device), torch.tensor([unit * rows.together + i for unit in part for i in range(rows.together)])
        before, done = done, done + len(part)
        if done * TOLD // rows.units != before * TOLD // rows.units:
            emit(Progress(what=what, done=done, total=rows.units))
