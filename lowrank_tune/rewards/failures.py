"""What becomes of a completion that a reward could not judge: never a 0."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.rewards.protocol import Choosy, Item, Score
from lowrank_tune.rewards.uses import Weighted


def unusable(weighted: Sequence[Weighted], item: Item) -> str | None:
    """Why a row is of no use to a reward, whatever the completion: a fault of the data, found before anything is
    drawn."""
    for each in weighted:
        if isinstance(each.reward, Choosy) and (why := each.reward.unusable(item)) is not None:
            return f"`{each.name}` cannot judge by it: {why}"
    return None


def failed(weighted: Sequence[Weighted], scores: Sequence[Score]) -> tuple[Weighted, Score] | None:
    """The first reward that could not tell what a completion is worth, with its score; one that stops the run before
    one that drops."""
    lost = [(each, score) for each, score in zip(weighted, scores, strict=True) if score.value is None]
    return min(lost, key=lambda one: one[0].on_error != "stop", default=None)
