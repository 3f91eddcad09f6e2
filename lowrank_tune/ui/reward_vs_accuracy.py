"""Gold beside the reward: what the watch over it looks at, taken from what a screen knows. Pure: state in, figures and
words out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from lowrank_tune.training.reward_hacking import DEFAULT_STDERR, WINDOW, EvalPoint
from lowrank_tune.ui.state import State

# times; share of word sequences
LENGTH_GROWTH = 1.3
REPETITION_RISE = 0.1


def eval_points_of(state: State) -> list[EvalPoint]:
    """The evaluations of the held-out questions, each with the mean reward of the steps since the one before; first the
    reference's."""
    accuracy, reward, noise = (
        state.series[name].points if name in state.series else []
        for name in ("heldout/accuracy", "reward", "heldout_accuracy_stderr")
    )
    errors = dict(noise)
    points = list[EvalPoint]()
    since = 0.0
    before = state.heldout.get(state.reference_name(), {}).get("accuracy")
    if before is not None and reward:
        points.append(EvalPoint(0, reward[0][1], before))
    for step, share in accuracy:
        rewards = [value for at, value in reward if since < at <= step and math.isfinite(value)]
        if rewards:
            points.append(EvalPoint(int(step), fmean(rewards), share, errors.get(step, DEFAULT_STDERR)))
            since = step
    return points


def describe_drift(state: State) -> Iterator[str]:
    """How the held-out answers have changed besides; where they were not measured, the completions."""
    lengths = values_of(state, "heldout/mean_length") or values_of(state, "completions/mean_length")
    if len(lengths) > WINDOW and lengths[0] > 0:
        first = lengths[0]
        now = fmean(lengths[-WINDOW:])
        if not 1 / LENGTH_GROWTH < now / first < LENGTH_GROWTH:
            yield f"answers {'grew' if now > first else 'shrank'} from {first:.3g} to {now:.3g} tokens"
    repeated = values_of(state, "heldout/repetition")
    if len(repeated) > WINDOW and (now := fmean(repeated[-WINDOW:])) > repeated[0] + REPETITION_RISE:
        yield f"{now:.0%} of their word sequences come again, {repeated[0]:.0%} at first"


def values_of(state: State, name: str) -> list[float]:
    """The finite values of a statistic."""
    series = state.series.get(name)
    if series:
        return [value for _, value in series.points if math.isfinite(value)]
    return []


def frontier(state: State, name: str = "reward") -> list[tuple[float, float]]:
    """What a statistic was where the policy had gone so far: (KL in nats a token, value). KL is that of the step, or
    what was measured last before it."""
    kl = state.series.get("kl")
    values = state.series.get(name)
    kl_points = [point for point in kl.points if math.isfinite(point[1])] if kl else []
    frontier_points = list[tuple[float, float]]()
    index = 0
    for step, value in values.points if values else ():
        while index < len(kl_points) and kl_points[index][0] <= step:
            index += 1
        if math.isfinite(value) and index and (name != "reward" or kl_points[index - 1][0] == step):
            frontier_points.append((kl_points[index - 1][1], value))
    return frontier_points
