"""Metrics with confidence intervals, of each variant and of each tuned variant minus the base. Pure functions of graded
answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from statistics import fmean
from typing import Any

from lowrank_tune.evaluation.evaluator import EvalResult
from lowrank_tune.evaluation.grading import GradedAnswer
from lowrank_tune.evaluation.intervals import (
    CONFIDENCE,
    Interval,
    Ratio,
    mean_ci,
    paired_difference_ci,
    pass_at_k,
    proportion_ci,
    ratio_ci,
)
from lowrank_tune.evaluation.target import BASE
from lowrank_tune.functional import perplexity

Metrics = dict[str, Interval]
AnswerValue = Callable[[GradedAnswer], float | None]
"""Returns a value of one answer, None if it has no such value."""
RIGHT: AnswerValue = attrgetter("right")
REWARD_MODEL_SCORE: AnswerValue = attrgetter("score")


@dataclass(frozen=True)
class MetricOptions:
    """`ks` of pass@k, the seed of the bootstrap, and the confidence level."""

    ks: Sequence[int]
    seed: int
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class PromptMetric:
    """A metric with one value per prompt: the mean of `value` over its answers, or pass@k of it with `k` > 0."""

    value: AnswerValue
    k: int = 0
    is_proportion: bool = False

    def of_prompt(self, answers: Sequence[GradedAnswer]) -> float | None:
        """Returns the value of a prompt; None if fewer than `k` of its answers, or none, have a value."""
        values = values_of(answers, self.value)
        if len(values) < max(1, self.k):
            return None
        if self.k:
            return pass_at_k(len(values), int(sum(values)), self.k)
        return fmean(values)

    def interval(
        self,
        values: Sequence[float],
        samples: int,
        options: MetricOptions,
    ) -> Interval:
        """Returns the mean over prompts of `samples` answers each."""
        if self.is_proportion:
            return proportion_ci(values, samples // max(1, self.k), options.confidence)
        return mean_ci(values, options.seed, options.confidence)


def values_of(answers: Iterable[GradedAnswer], value: AnswerValue) -> list[float]:
    """Returns the values of the answers that have one."""
    values = []
    for answer in answers:
        number = value(answer)
        if number is not None:
            values.append(number)
    return values


def _part_value(name: str) -> AnswerValue:
    def value(answer: GradedAnswer) -> float | None:
        return answer.parts.get(name)

    return value


def _prompt_metrics(answers: Iterable[Sequence[GradedAnswer]], ks: Sequence[int]) -> dict[str, PromptMetric]:
    """Returns the metrics of answers by name; several rewards have a metric each."""
    metrics = {}
    for k in ks:
        metrics[f"pass_at_{k}"] = PromptMetric(
            RIGHT,
            k,
            is_proportion=True,
        )
    metrics["reward"] = PromptMetric(attrgetter("reward"))
    parts: dict[str, None] = {}
    for prompt_answers in answers:
        for answer in prompt_answers:
            parts |= dict.fromkeys(answer.parts)
    if len(parts) > 1:
        for name in parts:
            metrics[f"rewards/{name}/mean"] = PromptMetric(_part_value(name))
    metrics["reward_model_score"] = PromptMetric(REWARD_MODEL_SCORE)
    metrics["eos_rate"] = PromptMetric(attrgetter("stopped"), is_proportion=True)
    metrics["mean_length"] = PromptMetric(attrgetter("tokens"))
    return metrics


def variant_metrics(
    result: EvalResult,
    variant: str,
    options: MetricOptions,
) -> Metrics:
    """Returns the metrics of one variant: `loss` (of plain text also `perplexity`), `pass_at_K`, `reward` (and
    `rewards/NAME/mean` of several), `reward_model_score`, `eos_rate`, `mean_length`."""
    metrics: Metrics = {}
    numbers = [number for number in result.done if number in result.losses[variant]]
    if numbers:
        nll_sums, tokens = _loss_ratio(result, variant, numbers)
        metrics["loss"] = ratio_ci(
            nll_sums,
            tokens,
            options.seed,
            options.confidence,
        )
        if all(question.is_document for question in result.questions):
            metrics["perplexity"] = _perplexity(metrics["loss"])
    answers = result.answers[variant]
    samples = max(map(len, answers.values()), default=0)
    for name, metric in _prompt_metrics(answers.values(), options.ks).items():
        prompt_values = [metric.of_prompt(prompt_answers) for prompt_answers in answers.values()]
        values = [value for value in prompt_values if value is not None]
        if values:
            metrics[name] = metric.interval(values, samples, options)
    return metrics


def _perplexity(loss: Interval) -> Interval:
    """Returns exp of a mean loss and of the ends of its interval."""
    return replace(
        loss,
        value=perplexity(loss.value),
        low=perplexity(loss.low),
        high=perplexity(loss.high),
    )


def deltas_vs_base(
    result: EvalResult,
    variant: str,
    options: MetricOptions,
) -> Metrics:
    """Returns the metrics of a tuned variant minus those of the base, on the prompts where both have a value. One
    bootstrap draw resamples both."""
    metrics: Metrics = {}
    losses = result.losses
    numbers = [number for number in result.done if number in losses[variant] and number in losses[BASE]]
    if numbers:
        metrics["loss"] = paired_difference_ci(
            _loss_ratio(result, variant, numbers),
            _loss_ratio(result, BASE, numbers),
            options.seed,
            options.confidence,
        )
    for name, metric in _prompt_metrics(result.answers[variant].values(), options.ks).items():
        tuned, base = _paired_values(result, variant, metric)
        if tuned:
            ones = [1.0] * len(tuned)
            metrics[name] = paired_difference_ci(
                (tuned, ones),
                (base, ones),
                options.seed,
                options.confidence,
            )
    return metrics


def _loss_ratio(
    result: EvalResult,
    variant: str,
    numbers: Sequence[int],
) -> Ratio:
    """Returns the summed losses and the tokens of these questions."""
    losses = [result.losses[variant][number] for number in numbers]
    return [loss.nll_sum for loss in losses], [float(loss.tokens) for loss in losses]


def _paired_values(
    result: EvalResult,
    variant: str,
    metric: PromptMetric,
) -> tuple[list[float], list[float]]:
    """Returns the values of the variant and of the base for the prompts where both have one."""
    tuned_values = []
    base_values = []
    for number in result.done:
        tuned = metric.of_prompt(result.answers[variant].get(number, ()))
        base = metric.of_prompt(result.answers[BASE].get(number, ()))
        if tuned is not None and base is not None:
            tuned_values.append(tuned)
            base_values.append(base)
    return tuned_values, base_values


def win_rates(
    result: EvalResult,
    variant: str,
    value: AnswerValue,
    confidence: float = CONFIDENCE,
) -> dict[str, Any] | None:
    """Returns how often an answer of the tuned variant has a higher value than one of the base to the same prompt.

    All pairs of a prompt's answers count, a tie as half a win; the interval is clustered by prompt. None if no pair
    can be compared.
    """
    rates: list[float] = []
    wins = 0.0
    ties = 0.0
    max_pairs = 0
    for number in result.done:
        tuned_values = values_of(result.answers[variant].get(number, ()), value)
        base_values = values_of(result.answers[BASE].get(number, ()), value)
        if not tuned_values or not base_values:
            continue
        pairs = list(product(tuned_values, base_values))
        better = sum(tuned > base for tuned, base in pairs)
        equal = sum(tuned == base for tuned, base in pairs)
        rates.append((better + equal / 2) / len(pairs))
        wins = wins + better / len(pairs)
        ties = ties + equal / len(pairs)
        max_pairs = max(max_pairs, min(len(tuned_values), len(base_values)))
    if not rates:
        return None
    interval = proportion_ci(rates, max_pairs, confidence)
    return {
        **interval.to_dict(),
        "wins": wins / len(rates),
        "ties": ties / len(rates),
        "losses": 1 - (wins + ties) / len(rates),
    }


def missing_scores(result: EvalResult) -> dict[str, int]:
    """Returns the number of answers that could not be graded, by their first failure."""
    counts: Counter[str] = Counter()
    for variant_answers in result.answers.values():
        for answers in variant_answers.values():
            counts.update(answer.failed for answer in answers if answer.failed)
    return dict(counts)
