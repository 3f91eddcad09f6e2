"""Samples over time: the same prompts step by step, and of held-out pairs both answers with their scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from lowrank_tune.events import SampleLogged
from lowrank_tune.ui.formatting import number, signed
from lowrank_tune.ui.html import render
from lowrank_tune.ui.metrics import PAIR_SIDES, reference_name
from lowrank_tune.ui.report.heldout import GradedAnswer, grade
from lowrank_tune.ui.report.run_log import RunLog

MAX_ROWS = 24
"""Rows of one prompt or pair over a run."""

T = TypeVar("T")


@dataclass(frozen=True)
class SampleRow:
    """One answer to a prompt."""

    label: str
    answer: GradedAnswer
    reward: str


@dataclass(frozen=True)
class PromptSamples:
    """The answers to one prompt over a run."""

    prompt: str
    ground_truth: str | None
    rows: Sequence[SampleRow]

    @property
    def has_rewards(self) -> bool:
        return any(row.reward for row in self.rows)


@dataclass(frozen=True)
class PairRow:
    """The scores of both sides of a pair after a step; `is_right` is None if one of them is missing."""

    step: int
    chosen: str
    rejected: str
    is_right: bool | None


@dataclass(frozen=True)
class PairSamples:
    """One held-out pair and its scores over a run."""

    prompt: str
    chosen: str
    rejected: str
    rows: Sequence[PairRow]


def samples(run_log: RunLog) -> Markup:
    """Returns the samples of each prompt and the scores of each held-out pair, empty if the run has none."""
    reference = reference_name(run_log.started)
    by_prompt: dict[str, list[SampleLogged]] = {}
    of_pairs = []
    for sample in run_log.samples:
        if sample.role in PAIR_SIDES:
            of_pairs.append(sample)
        else:
            by_prompt.setdefault(str(sample.prompt), []).append(sample)
    prompts = [
        _prompt_samples(
            prompt,
            logged,
            reference,
        )
        for prompt, logged in by_prompt.items()
    ]
    return render(
        "samples",
        prompts=prompts,
        pairs=_pair_samples(of_pairs),
    )


def _prompt_samples(
    prompt: str,
    logged: Sequence[SampleLogged],
    reference: str,
) -> PromptSamples:
    rows = []
    for sample in _spread(logged):
        answer = grade(
            str(sample.completion),
            sample.finish_reason == "stop",
            sample.ground_truth,
        )
        reward = "" if sample.reward is None else number(sample.reward)
        rows.append(
            SampleRow(
                _label(sample, reference),
                answer,
                reward,
            )
        )
    return PromptSamples(
        prompt,
        logged[0].ground_truth,
        rows,
    )


def _label(
    sample: SampleLogged,
    reference: str,
) -> str:
    if sample.role == "policy":
        return f"step {sample.step:,}"
    if sample.role == "reference":
        return reference
    return str(sample.role)


def _pair_samples(logged: Iterable[SampleLogged]) -> list[PairSamples]:
    """Returns each pair with its scores. The event of the chosen side comes directly before that of the rejected."""
    history: dict[tuple[str, str, str], list[PairRow]] = {}
    chosen = None
    for sample in logged:
        if chosen is not None and sample.role == "rejected" and sample.prompt == chosen.prompt:
            pair = (
                str(sample.prompt),
                str(chosen.completion),
                str(sample.completion),
            )
            history.setdefault(pair, []).append(_pair_row(chosen, sample))
        chosen = sample if sample.role == "chosen" else None
    return [PairSamples(*pair, _spread(rows)) for pair, rows in history.items()]


def _pair_row(
    chosen: SampleLogged,
    rejected: SampleLogged,
) -> PairRow:
    is_right = None
    if isinstance(chosen.reward, (int, float)) and isinstance(rejected.reward, (int, float)):
        is_right = chosen.reward > rejected.reward
    return PairRow(
        chosen.step,
        _score(chosen),
        _score(rejected),
        is_right,
    )


def _score(sample: SampleLogged) -> str:
    return signed(sample.reward) if isinstance(sample.reward, (int, float)) else ""


def _spread(items: Sequence[T]) -> list[T]:
    """Returns at most about `MAX_ROWS` of the items, spread over them; the first and the last are among them."""
    every = max(1, -(-len(items) // MAX_ROWS))
    return [*items[:-1:every], items[-1]]
