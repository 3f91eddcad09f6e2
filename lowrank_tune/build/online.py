"""The wiring of algorithms that write their own rows: prompts, rewards on the side, the harvester, and a look at both
before any training."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lowrank_tune import settings
from lowrank_tune.algorithms.failures import Failures, Unscored, in_words
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.harvest import Harvest, Harvester
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.ppo import PPO, Critic, Discount, Leash, Update
from lowrank_tune.build.learned import answer_ids, closed, closing, score_rows
from lowrank_tune.data import Asked, AskedSet, Template, asked_order, load_asked
from lowrank_tune.errors import RunFailed, UserError
from lowrank_tune.events import Emit, Grouped, Note, Progress
from lowrank_tune.maths import step_seed
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards import Item, Score, Scorer, Weighted, dead_share, examine, failed, garbage, make, unusable
from lowrank_tune.rewards.own import is_own
from lowrank_tune.rewards.protocol import Noted
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rollout import Engine
from lowrank_tune.types import Completion, Sampling

LOOKED_AT = 48  # reference answers that the rewards are tried on
TRIED, TRIES = 16, 4  # prompts, and completions of each, that tell how many groups will be dead
TRIAL, HARVEST = 1 << 20, 1 << 21  # tags that keep the seeds of trial and harvests apart


def load_prompts(recipe: settings.Recipe, template: Template, emit: Emit) -> AskedSet:
    """The prompts to draw completions for. Raises UserError."""
    found = load_asked(
        recipe.data, template, recipe.seed, emit, needs_gold=recipe.needs_gold, unusable=judged_rows(recipe)
    )
    for line in found.report.lines():
        emit(Note(message=line, level="warning" if "; dropped " in line else "info"))
    return found


def judged_rows(recipe: settings.Recipe) -> Callable[[Asked], str | None]:
    """Of each row of the data, why no reward could judge by it."""
    kits = [use for use in recipe.rewards if not is_own(use.use)]
    weighted = make(kits, Path.cwd()) if kits else []
    return lambda one: unusable(weighted, Item(one.text, "", one.gold, one.row, True, 1))


class Scoring:
    """The recipe's rewards on their workers, for a harvester."""

    def __init__(self, recipe: settings.Recipe, template: Template) -> None:
        self.weighted: list[Weighted] = make(recipe.rewards, Path.cwd())
        self.most = recipe.rollout.max_unscored_share
        self.weights = [each.weight for each in self.weighted]
        self.template = template
        self.learned = [each.reward for each in self.weighted if isinstance(each.reward, RewardModel)]
        self._end = closing(template) if self.learned else []
        self.scorer: Scorer[int] = Scorer([each.reward for each in self.weighted])

    def submit(self, key: int, asked: Asked, text: str, completion: Completion) -> None:
        stopped = completion.finish == "stop" and not self.template.marks_in(completion.ids[:-1])
        ids = [*asked.ids, *closed(completion.ids, self._end)] if self.learned else []
        self.scorer.submit(key, Item(asked.text, text, asked.gold, asked.row, stopped, len(completion.ids), ids))

    def attach(self, roles: Roles, micro_tokens: int) -> None:
        """Gives the learned rewards the base to read with."""
        for reward in self.learned:
            reward.read = lambda rows: score_rows(roles, rows, self.template.pad_id, micro_tokens)

    def item(self, asked: Asked, text: str) -> Item:
        """An answer that nobody drew, as if it had been: it ended by itself."""
        said = answer_ids(self.template, text) if self.learned else []
        return Item(
            asked.text, text, asked.gold, asked.row, True, max(1, len(text) // 4), [*asked.ids, *said] if said else ()
        )

    def collect(self) -> Mapping[int, Sequence[float] | Unscored]:
        return {key: self._values(scores) for key, scores in self.scorer.collect().items()}

    def _values(self, scores: Sequence[Score]) -> list[float] | Unscored:
        if (lost := failed(self.weighted, scores)) is None:
            return [float(score.value) for score in scores if score.value is not None]
        who, score = lost
        if who.on_error == "stop":
            raise RunFailed(f"rewards: {score.reason or score.verdict}")
        return Unscored(who.name, "timeout" if score.verdict == "timeout" else "error", score.reason or score.verdict)

    def close(self) -> None:
        self.scorer.close()


def check_rewards(scoring: Scoring, prompts: AskedSet, seed: int, emit: Emit) -> None:
    """Reference answers against garbage: a reward that cannot tell them apart teaches nothing. Raises UserError."""
    for each in scoring.weighted:
        if isinstance(each.reward, Noted):
            emit(Note(message=each.reward.note()))
    answered = [one for one in prompts.asked if one.answer]
    if not answered:
        emit(Note(message="the rows hold no reference answers, so the rewards were not tried on any", level="warning"))
        return
    some = random.Random(f"rewards-{seed}").sample(answered, min(LOOKED_AT, len(answered)))
    right = [scoring.item(one, str(one.answer)) for one in some]
    wrong = garbage(right, seed)
    if scoring.learned:
        per = {id(item.row): one for item, one in zip(right, some, strict=True)}
        wrong = [scoring.item(per[id(item.row)], item.completion) for item in wrong]
    report = examine(scoring.weighted, right, wrong, scoring.scorer, scoring.most)
    for line in report.lines():
        emit(Note(message=line))
    if doubt := report.doubt():
        emit(Note(message=doubt, level="warning"))
    if fault := report.fault():
        raise UserError(fault)


def make_harvester(
    recipe: settings.Recipe,
    roles: Roles,
    template: Template,
    prompts: AskedSet,
    scoring: Scoring,
    stop_ids: frozenset[int],
    micro_tokens: int,
    emit: Emit,
) -> Harvester:
    """Draws completions of the recipe's prompts, step by step."""
    order = asked_order(prompts, recipe.data, recipe.train, recipe.seed)
    wanted = recipe.rollout

    def prompts_of(step: int, draw: int, count: int | None) -> list[Asked]:
        rows = order.rows(step) if draw == 0 else order.others(step, draw, count or 1)
        return [prompts.asked[row] for row in rows]

    def show(step: int, harvest: Harvest, advantages: Tensor) -> None:
        emit(
            Grouped(
                step=step + 1,
                prompt=harvest.asked[0].text,
                gold=harvest.asked[0].gold,
                completions=_completions(harvest, advantages),
            )
        )

    return Harvester(
        roles,
        prompts_of,
        scoring,
        [each.name for each in scoring.weighted],
        scoring.weights,
        template.decode,
        stop_ids,
        template.pad_id,
        wanted.num_generations,
        wanted.max_new_tokens,
        wanted.temperature,
        wanted.slots,
        micro_tokens,
        lambda number: step_seed(recipe.seed, HARVEST + number),
        show,
        Failures(wanted.max_unscored_share),
    )


def _completions(harvest: Harvest, advantages: Tensor) -> list[Mapping[str, object]]:
    """The first group, as the screen shows it."""
    n = harvest.rewards.shape[1]
    return [_completion(harvest, advantages, i) for i in range(n)]


def _completion(harvest: Harvest, advantages: Tensor, i: int) -> Mapping[str, object]:
    told: dict[str, object] = {"text": harvest.texts[i], "finish": "length" if bool(harvest.truncated[i]) else "stop"}
    if (lost := harvest.unscored[i]) is not None:
        return told | {"reward": None, "advantage": None, "unscored": f"{lost.reward}: {lost.reason}", "parts": {}}
    return told | {
        "reward": float(harvest.rewards[0, i]),
        "advantage": float(advantages[0, i]),
        "parts": dict(zip(harvest.names, harvest.parts[i].tolist(), strict=True)),
    }


def grpo(recipe: settings.Recipe, kit: Kit, harvester: Harvester) -> GRPO:
    """The algorithm of the recipe."""
    wanted = recipe.grpo
    low = wanted.clip if wanted.clip_low is None else wanted.clip_low
    high = wanted.clip_high
    if high is None and wanted.loss not in ("dapo", "cispo"):
        high = wanted.clip
    return GRPO(
        kit,
        harvester,
        wanted.loss,
        low,
        high,
        wanted.kl,
        wanted.kl_in,
        wanted.kl_estimator,
        wanted.epochs,
        wanted.old,
        wanted.mismatch_limit,
        wanted.truncated,
        wanted.penalty,
        wanted.dead_groups,
    )


def ppo(recipe: settings.Recipe, kit: Kit, harvester: Harvester) -> PPO:
    """The algorithm of the recipe."""
    wanted = recipe.ppo
    critic = Critic(wanted.value_weight if wanted.value == "trunk" else 1.0, wanted.value_clip)
    return PPO(
        kit,
        harvester,
        critic,
        Discount(wanted.gamma, wanted.gae_lambda, wanted.truncated, wanted.penalty),
        Leash(wanted.kl, wanted.kl_target, wanted.kl_gain, wanted.update_kl_limit),
        Update(wanted.clip, wanted.entropy, wanted.epochs, wanted.minibatches, wanted.mismatch_limit),
    )


def try_groups(
    recipe: settings.Recipe,
    roles: Roles,
    template: Template,
    prompts: AskedSet,
    scoring: Scoring,
    stop_ids: frozenset[int],
    emit: Emit,
) -> None:
    """Says before the first step how many groups will teach nothing, from a few completions of a few prompts."""
    asked = random.Random(f"trial-{recipe.seed}").sample(prompts.asked, min(TRIED, len(prompts.asked)))
    sampling = Sampling(
        recipe.rollout.max_new_tokens, stop_ids, recipe.rollout.temperature, step_seed(recipe.seed, TRIAL)
    )
    what = "trying a few prompts"
    for done, completion in enumerate(
        Engine(roles, "policy", recipe.rollout.slots).generate([one.ids for one in asked], TRIES, sampling), 1
    ):
        body = completion.ids[:-1] if completion.finish == "stop" else completion.ids
        scoring.submit(
            completion.prompt * TRIES + completion.sample, asked[completion.prompt], template.decode(body), completion
        )
        if done % TRIES == 0:
            emit(Progress(what=what, done=done, total=len(asked) * TRIES))
    found = scoring.collect()
    lost = [values for values in found.values() if isinstance(values, Unscored)]
    if lost:
        emit(
            Note(
                level="warning",
                message=f"{len(lost)} of {len(found)} trial completions could not be scored: {in_words(lost)}",
            )
        )
    earned = {
        key: sum(w * v for w, v in zip(scoring.weights, values, strict=True))
        for key, values in found.items()
        if not isinstance(values, Unscored)
    }
    if not earned:
        raise UserError(f"rewards: none of {len(found)} trial completions could be scored: {in_words(lost)}")
    best, least = max(earned.values()), min(earned.values())
    n = recipe.rollout.num_generations
    if best - least <= 1e-6:
        told = f"{len(earned)} completions of {len(asked)} prompts all earn {best:.3g}: such groups have no signal; "
        emit(
            Note(
                level="warning",
                message=told + "an easier task, a partial reward or an SFT adapter below would give one",
            )
        )
        return
    tries = [[earned[key] for key in range(at * TRIES, (at + 1) * TRIES) if key in earned] for at in range(len(asked))]
    rates = [sum(value > (best + least) / 2 for value in several) / len(several) for several in tries if several]
    dead = dead_share(rates, n, TRIES)
    told = f"{sum(rates) / len(rates):.0%} of {len(earned)} trial completions earn more than half: "
    told += f"about {dead:.0%} of groups of {n} will be dead"
    emit(Note(message=told, level="warning" if dead > 0.6 else "info"))
