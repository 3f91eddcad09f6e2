"""Metrics with confidence intervals: of each variant, and of each tuned variant against the base. Pure: graded answers
in, metrics out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from lowrank_tune.evaluation.evaluator import EvalResult
from lowrank_tune.evaluation.grading import GradedAnswer
from lowrank_tune.evaluation.intervals import (
    CONFIDENCE,
    Interval,
    mean_ci,
    paired_difference_ci,
    pass_at_k,
    proportion_ci,
    ratio_ci,
)
from lowrank_tune.evaluation.target import BASE

Metrics = dict[str, Interval]
PromptMetric = Callable[[Sequence[GradedAnswer]], float | None]
"""A prompt's own figure, from the marks of all its answers; None where it has none."""


def pass_at_k_of(k: int) -> PromptMetric:
    """pass@k of one prompt, of the answers that could be graded; None where these are fewer than k."""

    def metric(answers: Sequence[GradedAnswer]) -> float | None:
        verdicts = [answer.right for answer in answers if answer.right is not None]
        if len(verdicts) >= k:
            return pass_at_k(len(verdicts), sum(verdicts), k)
        return None

    return metric


def mean_metric(value: Callable[[GradedAnswer], float | None]) -> PromptMetric:
    """The mean over a prompt's answers that have such a value."""

    def metric(answers: Sequence[GradedAnswer]) -> float | None:
        numbers = [number for answer in answers if (number := value(answer)) is not None]
        return fmean(numbers) if numbers else None

    return metric


def variant_metrics(
    result: EvalResult,
    variant: str,
    ks: Sequence[int],
    seed: int,
    confidence: float = CONFIDENCE,
) -> Metrics:
    """Return the metrics of one variant: `loss`, `pass_at_K`, `reward` (and `rewards/NAME/mean` of several),
    `reward_model_score`, `eos_rate`, `mean_length`."""
    metrics: Metrics = {}
    losses = [result.losses[variant][number] for number in result.done if number in result.losses[variant]]
    if losses:
        metrics["loss"] = ratio_ci(
            [loss.nll_sum for loss in losses],
            [loss.tokens for loss in losses],
            seed,
            confidence,
        )
    answers = result.answers[variant]
    samples = max(map(len, answers.values()), default=0)
    for name, prompt_metric in _prompt_metrics(answers.values(), ks).items():
        values = [value for prompt_answers in answers.values() if (value := prompt_metric(prompt_answers)) is not None]
        if not values:
            continue
        if name.startswith("pass_at_"):
            k = int(name.removeprefix("pass_at_"))
        else:
            k = 1
        is_proportion = k > 1 or name in ("pass_at_1", "eos_rate")
        metrics[name] = (
            proportion_ci(values, samples // k, confidence) if is_proportion else mean_ci(values, seed, confidence)
        )
    return metrics


def _prompt_metrics(answers: Iterable[Sequence[GradedAnswer]], ks: Sequence[int]) -> dict[str, PromptMetric]:
    """What there is to say of one prompt, by name."""
    reward_metrics = {name: mean_metric(value) for name, value in _reward_metrics(answers).items()}
    return {
        **{f"pass_at_{k}": pass_at_k_of(k) for k in ks},
        **reward_metrics,
        "eos_rate": mean_metric(lambda answer: float(answer.stopped)),
        "mean_length": mean_metric(lambda answer: float(answer.tokens)),
    }


def _reward_metrics(answers: Iterable[Sequence[GradedAnswer]]) -> dict[str, Callable[[GradedAnswer], float | None]]:
    """Figures that are no shares: the weighted reward, of several each one, and the reward model's score."""
    parts = list(
        dict.fromkeys(name for prompt_answers in answers for answer in prompt_answers for name in answer.parts)
    )
    metrics: dict[str, Callable[[GradedAnswer], float | None]] = {"reward": lambda answer: answer.reward}
    metrics |= {f"rewards/{name}/mean": partial(_reward_component, name) for name in parts if len(parts) > 1}
    return metrics | {"reward_model_score": lambda answer: answer.score}


def _reward_component(name: str, answer: GradedAnswer) -> float | None:
    return answer.parts.get(name)


def deltas_vs_base(
    result: EvalResult,
    variant: str,
    ks: Sequence[int],
    seed: int,
    confidence: float = CONFIDENCE,
) -> Metrics:
    """A tuned variant less the base, on the prompts where both have the figure; the draws of the bootstrap are of both
    together."""
    metrics: Metrics = {}
    both = [number for number in result.done if number in result.losses[variant] and number in result.losses[BASE]]
    if both:
        sides = [[result.losses[who][number] for number in both] for who in (variant, BASE)]
        tuned, baseline = (([loss.nll_sum for loss in side], [float(loss.tokens) for loss in side]) for side in sides)
        metrics["loss"] = paired_difference_ci(tuned, baseline, seed, confidence)
    for name, prompt_metric in _prompt_metrics(result.answers[variant].values(), ks).items():
        paired = [
            (tuned, baseline)
            for tuned, baseline in _pair_by_prompt(result, variant, prompt_metric)
            if tuned is not None and baseline is not None
        ]
        if paired:
            ones = [1.0] * len(paired)
            metrics[name] = paired_difference_ci(
                ([tuned for tuned, _ in paired], ones),
                ([baseline for _, baseline in paired], ones),
                seed,
                confidence,
            )
    return metrics


def _pair_by_prompt(
    result: EvalResult,
    variant: str,
    prompt_metric: PromptMetric,
) -> list[tuple[float | None, float | None]]:
    return [
        (prompt_metric(result.answers[variant][number]), prompt_metric(result.answers[BASE][number]))
        for number in result.done
        if number in result.answers[variant] and number in result.answers[BASE]
    ]


def win_rates(
    result: EvalResult,
    variant: str,
    value: Callable[[GradedAnswer], float | None],
    confidence: float = CONFIDENCE,
) -> dict[str, Any] | None:
    """How often the tuned variant's answer is worth more than the base's to the same prompt: over all pairs of a
    prompt's answers, a tie half a win; the interval is clustered by prompt. None where no pair could be compared."""
    rates = list[float]()
    wins = 0.0
    ties = 0.0
    pairs = 0
    for number in result.done:
        tuned_scores, base_scores = (
            [score for answer in result.answers[who].get(number, ()) if (score := value(answer)) is not None]
            for who in (variant, BASE)
        )
        if not tuned_scores or not base_scores:
            continue
        better = sum(tuned_score > base_score for tuned_score, base_score in product(tuned_scores, base_scores))
        equal = sum(tuned_score == base_score for tuned_score, base_score in product(tuned_scores, base_scores))
        count = len(tuned_scores) * len(base_scores)
        rates.append((better + equal / 2) / count)
        wins = wins + better / count
        ties = ties + equal / count
        pairs = max(pairs, min(len(tuned_scores), len(base_scores)))
    if not rates:
        return None
    interval = proportion_ci(rates, pairs, confidence)
    return {
        **interval.to_dict(),
        "wins": wins / len(rates),
        "ties": ties / len(rates),
        "losses": 1 - (wins + ties) / len(rates),
    }


def missing_scores(result: EvalResult) -> dict[str, int]:
    """Number of answers that could not be graded, by their first failure."""
    counts: dict[str, int] = {}
    for variant_answers in result.answers.values():
        for answers in variant_answers.values():
            for answer in answers:
                if answer.failed:
                    counts[answer.failed] = counts.get(answer.failed, 0) + 1
    return counts
