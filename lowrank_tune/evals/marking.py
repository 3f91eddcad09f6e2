"""What an answer is worth: right or wrong by a verifier or the gold answer, the recipe's rewards, and a reward model's
score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_tune import settings
from lowrank_tune.build.learned import ROLE, closed, closing, score_rows
from lowrank_tune.data import Template
from lowrank_tune.errors import UserError
from lowrank_tune.evals.questions import Question
from lowrank_tune.evals.subject import JUDGE
from lowrank_tune.evaluate import is_exact
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards import Item, Score, Scorer, Weighted, make, unusable
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.verdicts import is_right
from lowrank_tune.types import Completion

MICRO_TOKENS = 1 << 14
GOLD = "gold answer"


@dataclass(frozen=True)
class Mark:
    """One answer: `right` None where nothing could tell, `reward` None where a reward failed or there are none, `parts`
    of it by name, the judge's `score`. `stopped`: it ended by itself, within its turn. `failed`: which reward or
    verifier could not tell, and why."""

    text: str
    tokens: int
    stopped: bool
    right: bool | None
    reward: float | None
    parts: Mapping[str, float]
    score: float | None
    failed: str = ""


class Marking:
    """Marks answers while others are still written. Use it as a context manager: its workers end with it.

    `verifier` (a reward by name) says what is right; else every reward of the recipe that judges; else whether the gold
    answer was given. Raises UserError where a reward cannot be made.
    """

    def __init__(self, recipe: settings.Recipe | None, verifier: str | None, judged: bool, template: Template) -> None:
        self.template = template
        rewards = make(recipe.rewards, Path.cwd()) if recipe is not None and recipe.rewards else []
        self.rewards: list[Weighted] = rewards
        self.verifiers = (
            make([settings.RewardUse(use=verifier)], Path.cwd())
            if verifier is not None
            else [each for each in rewards if each.reward.judges and not isinstance(each.reward, RewardModel)]
        )
        if verifier is not None and not self.verifiers[0].reward.judges:
            raise UserError(f"--verifier: `{verifier}` does not tell right from wrong")
        self.judged = judged
        self._all = [*rewards, *(each for each in self.verifiers if each not in rewards)]
        self._judge = RewardModel(JUDGE)
        self._learned = [each.reward for each in rewards if isinstance(each.reward, RewardModel)]
        self._end = closing(template) if self._learned or judged else []
        self._items: dict[tuple[int, int], tuple[Item, bool | None]] = {}
        self._scorer: Scorer[tuple[int, int]] = Scorer(
            [*(each.reward for each in self._all), *([self._judge] if judged else [])]
        )

    def __enter__(self) -> Marking:
        return self

    def __exit__(self, *_: object) -> None:
        self._scorer.close()

    @property
    def right_by(self) -> str:
        """What tells right from wrong, in words."""
        return " and ".join(each.name for each in self.verifiers) or GOLD

    def tells(self, questions: Sequence[Question]) -> bool:
        """Whether it can be told of any of these questions which answers are right."""
        return bool(self.verifiers) or any(one.gold is not None for one in questions)

    def attach(self, roles: Roles) -> None:
        """Gives the learned rewards the base to read with."""
        for reward, role in [*((each, ROLE) for each in self._learned), (self._judge, JUDGE)]:
            reward.read = lambda rows, role=role: score_rows(roles, rows, self.template.pad_id, MICRO_TOKENS, role)

    def submit(self, key: tuple[int, int], question: Question, completion: Completion) -> None:
        """Takes an answer, as soon as it is written."""
        body = completion.ids[:-1] if completion.finish == "stop" else completion.ids
        text, stopped = self.template.decode(body), completion.finish == "stop" and not self.template.marks_in(body)
        ids = [*question.ids, *closed(completion.ids, self._end)] if self._learned or self.judged else ()
        item = Item(question.text, text, question.gold, question.row, stopped, len(completion.ids), ids)
        # what runs on and on has not answered
        exact = None if question.gold is None else stopped and is_exact(text, question.gold)
        self._items[key] = item, exact
        self._scorer.submit(key, item)

    def collect(self) -> dict[tuple[int, int], Mark]:
        """Waits for the marks of all that was submitted."""
        found, items, self._items = self._scorer.collect(), self._items, {}
        return {key: self._mark(*items[key], scores) for key, scores in found.items()}

    def unusable(self, question: Question) -> str | None:
        """Why a reward or a verifier could not judge any answer to this question."""
        return unusable(self._all, Item(question.text, "", question.gold, question.row, True, 1))

    def _mark(self, item: Item, exact: bool | None, scores: Sequence[Score]) -> Mark:
        told = list(zip(self._all, scores, strict=False))  # the judge's score, where there is one, is the last
        verdicts = [is_right(score) for each, score in told if each in self.verifiers]
        right = exact if not self.verifiers else False if False in verdicts else None if None in verdicts else True
        earned = {each.name: (each.weight, score.value) for each, score in told[: len(self.rewards)]}
        parts = {name: value for name, (_, value) in earned.items() if value is not None}
        whole = sum(earned[name][0] * value for name, value in parts.items()) if len(parts) == len(earned) > 0 else None
        lost = next(
            (f"{each.name}: {score.reason or score.verdict}" for each, score in told if score.value is None), ""
        )
        return Mark(
            item.completion,
            item.tokens,
            item.stopped,
            right,
            whole,
            parts,
            scores[-1].value if self.judged else None,
            lost,
        )
