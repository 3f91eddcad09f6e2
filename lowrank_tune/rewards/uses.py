"""From a recipe's `rewards` to rewards with names and weights, and from their scores to the figure that trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_tune.errors import Fault, Faults, RunFailed, UserError, did_you_mean
from lowrank_tune.rewards.answer import Answer
from lowrank_tune.rewards.json_schema import needs, read_schema
from lowrank_tune.rewards.lean import make_lean
from lowrank_tune.rewards.length import Length
from lowrank_tune.rewards.math_answer import make_math_answer
from lowrank_tune.rewards.own import is_own, read_own
from lowrank_tune.rewards.protocol import Reward, Score
from lowrank_tune.rewards.python_tests import PythonTests
from lowrank_tune.rewards.repetition import NGRAM, Repetition
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.shape import Shape
from lowrank_tune.rewards.smt import Smt
from lowrank_tune.rewards.symbolic import make_symbolic
from lowrank_tune.settings import RewardUse


@dataclass(frozen=True)
class Weighted:
    """A reward under a name of its own, what it counts for, and what becomes of a completion on which it fails."""

    name: str
    weight: float
    reward: Reward
    on_error: Literal["stop", "drop"] = "drop"


def make(uses: Sequence[RewardUse], folder: Path) -> list[Weighted]:
    """The rewards of a recipe; files of functions are looked for from `folder`. Raises Faults with everything that is
    wrong."""
    if not uses:
        raise UserError("`rewards` is empty; name at least one, as `[{use: answer}]`")
    made, faults = [], []
    for place, (use, name) in enumerate(zip(uses, names(uses), strict=True)):
        try:
            made.append(
                Weighted(
                    name, use.weight, _make(use, name, folder), use.on_error or ("stop" if is_own(use.use) else "drop")
                )
            )
        except UserError as error:
            faults.append(Fault(str(error), f"rewards.{place}"))
    if faults:
        raise Faults(faults)
    return made


def names(uses: Sequence[RewardUse]) -> list[str]:
    """What the screen calls each: its word, or its function; a second one of a name is `answer-2`."""
    seen: Counter[str] = Counter()
    found = []
    for use in uses:
        word = use.use.rpartition(":")[2] if is_own(use.use) else use.use
        seen[word] += 1
        found.append(word if seen[word] == 1 else f"{word}-{seen[word]}")
    return found


def _make(use: RewardUse, name: str, folder: Path) -> Reward:
    if not is_own(use.use) and use.use not in MAKERS:
        known = f"Known are {', '.join(MAKERS)}, and `./file.py:function`"
        raise UserError(f"unknown reward `{use.use}`{did_you_mean(use.use, tuple(MAKERS))} {known}")
    _check_settings(use)
    return read_own(name, use.use, folder) if is_own(use.use) else MAKERS[use.use](use, name, folder)


def _check_settings(use: RewardUse) -> None:
    """Each reward has the settings that it needs and no others."""
    for setting, owners in OWNERS.items():
        value = getattr(use, setting)
        if use.use in owners and value is None and setting not in OPTIONAL:
            raise UserError(f"`{use.use}` needs `{setting}`")
        if use.use not in owners and value is not None:
            raise UserError(
                f"`{setting}` does nothing for `{use.use}`; it belongs to "
                f"{' and '.join(f'`{owner}`' for owner in owners)}"
            )
    if use.weight == 0:
        raise UserError(f"`{use.use}` has weight 0 and would change nothing; leave it out")


def _answer(use: RewardUse, name: str, folder: Path) -> Reward:
    return Answer(name)


def _math_answer(use: RewardUse, name: str, folder: Path) -> Reward:
    return make_math_answer(name)


def _python_tests(use: RewardUse, name: str, folder: Path) -> Reward:
    return PythonTests(name, use.accept_unsafe_code is not None)


def _reward_model(use: RewardUse, name: str, folder: Path) -> Reward:
    return RewardModel(name)


def _symbolic(use: RewardUse, name: str, folder: Path) -> Reward:
    return make_symbolic(name)


def _length(use: RewardUse, name: str, folder: Path) -> Reward:
    assert use.target_tokens is not None
    return Length(name, use.target_tokens)


def _format(use: RewardUse, name: str, folder: Path) -> Reward:
    assert use.pattern is not None
    try:
        return Shape(name, use.pattern, whole=use.use == "format")
    except UserError as error:
        raise UserError(f"`pattern` {error}") from None


def _repetition(use: RewardUse, name: str, folder: Path) -> Reward:
    return Repetition(name, NGRAM if use.ngram is None else use.ngram)


def _json_schema(use: RewardUse, name: str, folder: Path) -> Reward:
    assert use.json_schema is not None
    return read_schema(name, use.json_schema, folder)


def _smt(use: RewardUse, name: str, folder: Path) -> Reward:
    assert use.kind is not None
    needs(name, "z3", "z3-solver")
    return Smt(name, use.kind)


def _lean(use: RewardUse, name: str, folder: Path) -> Reward:
    return make_lean(name, use.program)


MAKERS: Mapping[str, Callable[[RewardUse, str, Path], Reward]] = {
    "answer": _answer,
    "math_answer": _math_answer,
    "symbolic": _symbolic,
    "format": _format,
    "regex": _format,
    "json_schema": _json_schema,
    "length": _length,
    "repetition": _repetition,
    "python_tests": _python_tests,
    "reward_model": _reward_model,
    "smt": _smt,
    "lean": _lean,
}
"""How each reward that a recipe can name is made, from its settings, its name on the screen, and the folder of its
files."""
OWNERS: Mapping[str, tuple[str, ...]] = {
    "pattern": ("format", "regex"),
    "target_tokens": ("length",),
    "ngram": ("repetition",),
    "accept_unsafe_code": ("python_tests",),
    "json_schema": ("json_schema",),
    "kind": ("smt",),
    "program": ("lean",),
}
"""Whose each setting of `RewardUse` is; it is needed there unless it is in OPTIONAL, and a fault elsewhere."""
OPTIONAL: frozenset[str] = frozenset({"accept_unsafe_code", "ngram", "program"})


def total(scores: Sequence[Score], weights: Sequence[float]) -> float:
    """The weighted sum of a completion's scores.

    A score without a value, an error or a timeout, raises RunFailed: a reward that could not tell never counts as
    wrong.
    """
    for score in scores:
        if score.value is None:
            raise RunFailed(f"rewards: {score.reason or score.verdict}")
    return sum(weight * score.value for score, weight in zip(scores, weights, strict=True) if score.value is not None)
