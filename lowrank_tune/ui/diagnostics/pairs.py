"""Checks of preference pairs: of DPO and of reward models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from lowrank_tune.ui.diagnostics.diagnosis import (
    MIN_STEPS,
    Diagnosis,
    bad,
    first_quarter,
    last_quarter,
    recent_mean,
    short_number,
    trained_mean,
    warning,
)
from lowrank_tune.ui.metrics import PAIR_ACCURACY, PAIR_MARGIN
from lowrank_tune.ui.reward_vs_accuracy import values_of
from lowrank_tune.ui.state import State

CHOSEN_LOGP_DROP = -0.5
"""Equals `algorithms.dpo.CHOSEN_LOGP_DROP`, whose module loads torch."""

# Pairs, as shares of them.
CHANCE = 0.5
CHANCE_MARGIN = 0.05
SATURATED_ACCURACY = 0.98
MIN_ACCURACY_DROP = 0.05
"""Below the best validation."""
MAX_LENGTH_CORRELATION = 0.5


def chosen_logps_drop(state: State) -> Iterator[Diagnosis]:
    """The collapse of DPO: the margin grows while both sides become less likely."""
    change = recent_mean(state, "logps/chosen_delta")
    if state.algorithm != "kto" and change < CHOSEN_LOGP_DROP:
        yield bad(
            f"the chosen answers are unlearned: {short_number(-change)} nats a token less likely than under the "
            "reference: raise dpo.beta, lower train.learning_rate, or set dpo.sft_coef"
        )


def rejected_preferred(state: State) -> Iterator[Diagnosis]:
    right = _pair_accuracy(state)
    if right < CHANCE - CHANCE_MARGIN:
        yield bad(
            f"the rejected answers are preferred: {right:.0%} of the training pairs are right: "
            f"check with lowrank-tune data whether they are swapped"
        )


def pairs_not_separated(state: State) -> Iterator[Diagnosis]:
    right = _pair_accuracy(state)
    if not _is_chance(right):
        return
    margins = values_of(state, PAIR_MARGIN[state.algorithm])
    grows = len(margins) >= MIN_STEPS and last_quarter(margins) > first_quarter(margins)
    margin = "the margin grows slowly" if grows else "the margin does not grow"
    yield warning(
        f"chosen and rejected are not separated: {right:.0%} of the training pairs are right, {margin}: "
        "a higher train.learning_rate, more steps, or pairs that differ more clearly"
    )


def heldout_pairs_not_separated(state: State) -> Iterator[Diagnosis]:
    """Held-out pairs decide for a reward model, because it can memorize its training pairs."""
    right = _pair_accuracy(state)
    if not right > CHANCE or _is_chance(right):
        return
    metric = f"eval_{PAIR_ACCURACY[state.algorithm]}"
    checked = recent_mean(state, metric)
    if len(values_of(state, metric)) > 1 and _is_chance(checked):
        yield warning(
            f"held-out pairs are not separated: {checked:.0%} are right, in training {right:.0%}: "
            "more or clearer pairs, a smaller adapter, or fewer steps"
        )


def _pair_accuracy(state: State) -> float:
    """Returns the share of right training pairs, nan for an algorithm without pairs and before `MIN_STEPS`."""
    if state.algorithm not in PAIR_ACCURACY:
        return math.nan
    return trained_mean(state, PAIR_ACCURACY[state.algorithm])


def _is_chance(share: float) -> bool:
    return abs(share - CHANCE) <= CHANCE_MARGIN


def overconfident(state: State) -> Iterator[Diagnosis]:
    """A reward model that has memorized its training pairs becomes worse at others, with more confidence."""
    right = trained_mean(state, "accuracy")
    checked = values_of(state, "eval_accuracy")
    if state.algorithm != "reward" or len(checked) <= 2 or not right >= SATURATED_ACCURACY:
        return
    now = fmean(checked[-2:])
    if now < max(checked) - MIN_ACCURACY_DROP:
        yield warning(
            f"the reward model is confident about its training pairs ({right:.0%} right) and worse at held-out ones "
            f"({max(checked):.0%} -> {now:.0%}): fewer steps, a lower train.learning_rate, or more pairs"
        )


def follows_length(state: State) -> Iterator[Diagnosis]:
    """A preference for long answers, the most frequent fault of reward models."""
    correlation = state.last("pairs/length_correlation")
    if correlation is None or not abs(correlation) > MAX_LENGTH_CORRELATION:
        return
    winner = "longer" if correlation > 0 else "shorter"
    advice = "balance the lengths in the data"
    if state.algorithm == "dpo":
        advice += ", or set dpo.loss_type=sigmoid_norm"
    yield warning(
        f"the score follows the length of an answer (correlation {correlation:+.2f}): "
        f"{winner} ones win regardless of their content: {advice}"
    )
