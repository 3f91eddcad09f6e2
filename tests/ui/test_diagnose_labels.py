"""Each diagnosis of answers with a label: given for a run with its fault, and not for others; and their charts."""

from __future__ import annotations

import pytest
from test_diagnose import Values, after, diagnoses_text

from lowrank_tune.algorithms import kto
from lowrank_tune.ui.compare.runs import metric_family
from lowrank_tune.ui.diagnostics.labels import STEPS_WITHOUT_KL
from lowrank_tune.ui.diagnostics.pairs import CHOSEN_LOGP_DROP
from lowrank_tune.ui.metrics import CHARTS, descriptions_of, kl_metric
from lowrank_tune.ui.state import State

ANSWERS: Values = {
    "rewards/accuracies": lambda s: min(0.95, 0.5 + s / 40),
    "rewards/chosen": lambda s: s / 20,
    "rewards/rejected": lambda s: -s / 10,
    "logps/chosen_delta": lambda s: s / 100,
    "kl": lambda s: 9.0,
    "kl_per_token": lambda s: s / 100,
}
"""Of a healthy run; its estimate of the KL is in nats an answer."""


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (after(40, "kto", **{**ANSWERS, "logps/chosen_delta": lambda s: -s / 60}), "bad: the desirable answers are un"),
        (after(40, "kto", **{**ANSWERS, "kl_per_token": lambda s: 3.0}), "above 2: raise kto.beta or lower train"),
        (after(40, "kto", **{**ANSWERS, "rewards/accuracies": lambda s: 0.3}), "bad: the labels are not followed: 30%"),
        (after(40, "kto", **{**ANSWERS, "rewards/accuracies": lambda s: 0.5}), "the classes are not separated: 50%"),
        (
            after(40, "kto", **{name: of for name, of in ANSWERS.items() if name != "rewards/rejected"}),
            "warning: no step had an undesirable answer",
        ),
        (
            after(60, "kto", **{**ANSWERS, "kl": lambda s: 0.0, "rewards/chosen": lambda s: -0.1}),
            "warning: the KL estimate is 0 for 50 steps",
        ),
    ],
)
def test_fault_has_a_diagnosis(state: State, sentence: str) -> None:
    assert sentence in diagnoses_text(state)


@pytest.mark.parametrize(
    "state",
    [
        after(40, "kto", **ANSWERS),
        after(40, "kto", **{**ANSWERS, "logps/chosen_delta": lambda s: -0.45}),
        after(60, "kto", **{**ANSWERS, "kl": lambda s: 0.0}),
        after(60, "kto", **{**ANSWERS, "kl": lambda s: float(s == 30), "rewards/chosen": lambda s: -0.1}),
    ],
)
def test_healthy_run_has_no_diagnosis(state: State) -> None:
    assert diagnoses_text(state).startswith("good: all good")


def test_limits_equal_those_of_the_algorithm() -> None:
    """`ui.diagnostics.labels` cannot import them, because `algorithms.kto` loads torch."""
    assert (CHOSEN_LOGP_DROP, STEPS_WITHOUT_KL) == (kto.CHOSEN_LOGP_DROP, kto.STEPS_WITHOUT_KL)


def test_charts_have_descriptions_and_the_kl_of_an_answer_is_compared_with_none_of_a_token() -> None:
    descriptions = descriptions_of("kto")
    assert {names[0] for names in CHARTS["kto"]} <= descriptions.keys()
    assert "per answer" in descriptions["kl"] and "per token" in descriptions["kl_per_token"]
    assert (kl_metric("kto"), kl_metric("dpo")) == ("kl_per_token", "kl")
    assert metric_family("kl", "kto") != metric_family("kl", "dpo") == metric_family("kl", "grpo")
