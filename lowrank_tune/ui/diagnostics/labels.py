"""Checks of answers with a label, of KTO."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_tune.ui.diagnostics.diagnosis import (
    MIN_STEPS,
    Diagnosis,
    bad,
    recent_mean,
    short_number,
    trained_mean,
    warning,
)
from lowrank_tune.ui.diagnostics.pairs import CHANCE, CHANCE_MARGIN, CHOSEN_LOGP_DROP
from lowrank_tune.ui.reward_vs_accuracy import values_of
from lowrank_tune.ui.state import State

STEPS_WITHOUT_KL = 50
"""Equals `algorithms.kto.STEPS_WITHOUT_KL`, whose module loads torch."""


def desirable_unlearned(state: State) -> Iterator[Diagnosis]:
    """The loss falls while all answers become less likely."""
    change = recent_mean(state, "logps/chosen_delta")
    if state.algorithm == "kto" and change < CHOSEN_LOGP_DROP:
        yield bad(
            f"the desirable answers are unlearned: {short_number(-change)} nats a token less likely than under the "
            "reference: raise kto.beta or kto.desirable_weight, or lower train.learning_rate"
        )


def one_class(state: State) -> Iterator[Diagnosis]:
    """Without rows of the other class the loss has no contrast."""
    if state.algorithm != "kto" or len(values_of(state, "loss")) < MIN_STEPS:
        return
    for side, missing in (("rejected", "an undesirable"), ("chosen", "a desirable")):
        if not values_of(state, f"rewards/{side}"):
            yield warning(f"no step had {missing} answer, and the loss has no contrast: add such rows")


def labels_not_separated(state: State) -> Iterator[Diagnosis]:
    if state.algorithm != "kto":
        return
    share = trained_mean(state, "rewards/accuracies")
    if share < CHANCE - CHANCE_MARGIN:
        yield bad(
            f"the labels are not followed: {share:.0%} of the training answers moved in the direction of their label: "
            "check with lowrank-tune data whether the labels are swapped"
        )
    elif share <= CHANCE + CHANCE_MARGIN:
        yield warning(
            f"the classes are not separated: {share:.0%} of the training answers moved in the direction of their "
            "label: a higher train.learning_rate, more steps, or clearer labels"
        )


def kl_estimate_is_zero(state: State) -> Iterator[Diagnosis]:
    """Answers to other prompts and desirable answers both become less likely."""
    estimates = values_of(state, "kl")[-STEPS_WITHOUT_KL:]
    if state.algorithm != "kto" or len(estimates) < STEPS_WITHOUT_KL or any(estimates):
        return
    if trained_mean(state, "rewards/chosen") < 0:
        yield warning(
            f"the KL estimate is 0 for {STEPS_WITHOUT_KL} steps, and desirable answers become less likely: lower "
            "train.learning_rate, or raise kto.beta"
        )
