"""GRPO: group relative policy optimisation (arXiv:2402.03300, equations 3 and 4) and its relatives, by name.

n completions y_i of one prompt earn R_i;  A_i = (R_i - mean R) / (std R + 1e-4), the population's std over the group.
rho_it = p(y_it) / p_old(y_it), old being the policy that wrote the completions. N completions in the step, m_it what
the policy wrote.

    L = sum_it w_it [ -min(rho A, clip(rho, 1 - low, 1 + high) A) + lambda KL(p || ref) ]

grpo      w = 1 / (N |y_i|): every completion counts alike dapo      w = 1 / (tokens of the step): every token counts
alike; high 0.28                                    arXiv:2503.14476 dr_grpo   w = 1 / (N max_new_tokens), A = R - mean
R: neither length nor spread divides                        arXiv:2503.20783 gspo      grpo's weights, rho of the whole
sequence: exp of the mean log-ratio a token                         arXiv:2507.18071 cispo     dapo's weights,
-sg(min(rho, high)) A log p: the weight is clipped, no gradient is lost; high 5      arXiv:2506.13585

A completion that no reward can be told for (`failures.py`) leaves its group before anything is counted. A group whose
rewards are all equal (within 1e-6), or that has no two left, has A = 0 exactly. KL in the loss a token, d = log ref -
log p: k3_ratio (e^d - d - 1) rho, whose gradient is that of KL(p || ref); k3 without rho; k2 d^2 / 2; exact, over the
whole vocabulary. KL in the reward: R_i loses lambda sum_t (log p_old - log ref).

Metrics: `reward` R before any KL, `reward_spread` its std in a group, `reward_NAME` each reward by itself;
`dead_groups` the share of groups without signal; `length` tokens a completion, `truncated` the share cut by the limit;
`kl` to the reference, nats a token; `entropy` nats; `clip_fraction` the share of tokens where the clip stops the
gradient; `mismatch` mean |log p - log p_sampler| in the first pass; `loss` is L; `rollout_seconds` and `score_seconds`
the time of collecting; `score_errors` and `score_timeouts` how many completions of the step a reward failed on, from
the first such on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_tune.algorithms.failures import Unscored
from lowrank_tune.algorithms.harvest import Harvest, Harvester
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.step_zero import check_reference
from lowrank_tune.errors import RunFailed
from lowrank_tune.maths import mean_over, token_mean_weights, where_says
from lowrank_tune.types import Batch, Experience, Mean, Stats, Term, add_stats

EPSILON = 1e-4
EQUAL = 1e-6
CLIP_HIGH = {"dapo": 0.28, "cispo": 5.0}
RISEN = 0.05  # above the first step's reward: something was learned
MOST_DRAWS = 4  # harvests of one step, where dead groups are replaced


def group_advantages(rewards: Tensor, divide: bool = True, scored: Tensor | None = None) -> Tensor:
    """Rewards (groups, n) -> advantages (groups, n); exactly 0 for a group of equal rewards, and where `scored` is
    False."""
    rewards = rewards.double()
    if scored is not None and not bool(scored.all()):  # such a group is what is left of it
        found = torch.zeros(rewards.shape)
        for group in scored.any(dim=1).nonzero().flatten().tolist():
            found[group, scored[group]] = group_advantages(rewards[group, scored[group]][None], divide)[0]
        return found
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if divide:
        centred = centred / (rewards.std(dim=1, keepdim=True, correction=0) + EPSILON)
    return torch.where(dead(rewards)[:, None], torch.zeros_like(centred), centred).float()


def dead(rewards: Tensor, scored: Tensor | None = None) -> Tensor:
    """(groups, n) -> (groups,) bool: all that is `scored` is equal, or one completion at most, so that there is nothing
    to learn from."""
    if scored is not None:
        rewards = torch.where(scored, rewards, torch.inf)
        least, most = rewards.amin(dim=1), torch.where(scored, rewards, -torch.inf).amax(dim=1)
        return most - least <= EQUAL
    return rewards.amax(dim=1) - rewards.amin(dim=1) <= EQUAL


def policy_loss(
    kind: str, logps: Tensor, old: Tensor, advantage: Tensor, says: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """logps, old, says (B, T), advantage (B,) -> the loss of each token and whether the clip stopped its gradient; (B,
    T) each."""
    change = where_says(logps - old, says)
    if kind == "gspo":
        change = (change.sum(dim=1, keepdim=True) / says.sum(dim=1, keepdim=True).clamp_min(1)).expand_as(change)
    ratio, advantage = change.exp(), advantage[:, None]
    if kind == "cispo":
        weight = ratio.detach().clamp_max(high)
        return where_says(-weight * advantage * logps, says), (ratio > high) & says
    clipped = ratio.clamp(1 - low, 1 + high)
    stopped = (clipped * advantage < ratio * advantage) & says
    return where_says(-torch.minimum(ratio * advantage, clipped * advantage), says), stopped


def kl_penalty(estimator: str, logps: Tensor, old: Tensor, reference: Tensor, says: Tensor) -> Tensor:
    """logps, old, reference (B, T) -> the KL term of each token (B, T)."""
    d = where_says(reference - logps, says)
    if estimator == "k2":
        return d.square() / 2
    k3 = torch.expm1(d) - d
    return k3 * where_says(logps - old, says).exp() if estimator == "k3_ratio" else k3


@dataclass
class Harvested(Experience):
    """The harvest, `epochs` times."""

    epochs: int = 1

    def parts(self) -> Iterator[Batch]:
        for _ in range(self.epochs):
            yield self.batch


class GRPO:
    """The three verbs. `low` and `high` are the clips, `kl` is lambda."""

    together = 1

    def __init__(
        self,
        kit: Kit,
        harvester: Harvester,
        loss: str = "grpo",
        low: float = 0.2,
        high: float | None = None,
        kl: float = 0.05,
        kl_in: str = "loss",
        kl_estimator: str = "k3_ratio",
        epochs: int = 1,
        old: str = "recomputed",
        mismatch_limit: float = 0.1,
        truncated: str = "keep",
        penalty: float = 1.0,
        dead_groups: str = "drop",
    ) -> None:
        self.kit, self.harvester, self.loss, self.low = kit, harvester, loss, low
        self.high = CLIP_HIGH.get(loss, 0.2) if high is None else high
        self.kl, self.kl_in, self.kl_estimator, self.epochs, self.old = kl, kl_in, kl_estimator, epochs, old
        self.mismatch_limit, self.truncated, self.penalty, self.dead_groups = (
            mismatch_limit,
            truncated,
            penalty,
            dead_groups,
        )
        self._first_pass, self._rows, self._idle = True, 1, False
        self._first_reward: float | None = None
        self._drawn, self._lost = 0, list[Unscored]()

    def collect(self, step: int) -> Experience:
        harvests = [self._draw(step, 0)]
        wanted = harvests[0].groups
        while (
            self.dead_groups == "resample"
            and len(harvests) < MOST_DRAWS
            and (missing := wanted - sum(h.live(dead) for h in harvests))
        ):
            harvests.append(self._draw(step, len(harvests), missing))
        stats: Stats = {}
        for harvest in harvests:
            add_stats(
                stats,
                harvest.stats() | {"dead_groups": Mean(dead(harvest.rewards, harvest.scored).sum(), harvest.groups)},
            )
        stats |= {name: Mean(stats[name].total, 1) for name in harvests[0].seconds}  # of all draws together
        harvest = Harvest.join(harvests, self.harvester.pad_id)
        self._drawn, self._lost = len(harvest.unscored), [one for one in harvest.unscored if one is not None]
        stats |= self.harvester.failures.stats(self._lost)
        # Where nothing can be told apart the step weighs nothing: what KL alone leaves is noise there, and Adam walks
        # at its full rate.
        alive = ~dead(harvest.earned, harvest.scored) if self.dead_groups != "keep" else harvest.scored.any(dim=1)
        self._idle = not bool(alive.any())
        harvest = harvest if self._idle or bool(alive.all()) else harvest.pick(alive)
        advantages = group_advantages(harvest.earned, self.loss != "dr_grpo", harvest.scored)
        self.harvester.show(step, harvest, advantages)
        batch = self._batch(harvest, advantages)
        if self.epochs > 1 and self.old == "recomputed":
            batch.extra["old"] = self.harvester.logps("policy", batch)
        self._first_pass = True
        return Harvested(batch, stats, self.epochs)

    def _batch(self, harvest: Harvest, advantages: Tensor) -> Batch:
        """What is trained on: the rows that were scored, with their advantages."""
        batch = harvest.batch
        batch.extra["advantage"] = advantages.flatten()
        if self.truncated == "mask":
            batch.says &= ~harvest.truncated[:, None]
        return batch if self._idle or bool(harvest.scored.all()) else harvest.told()

    def _draw(self, step: int, draw: int, prompts: int | None = None) -> Harvest:
        """Completions with what they earn: reward, minus the penalty of being cut, minus the KL where that stands in
        the reward."""
        harvest = self.harvester.draw(step, draw, prompts)
        batch = harvest.batch
        if self.kl:
            if self.kl_in == "reward" or self.kl_estimator != "exact":
                batch.extra["reference_logps"] = self.harvester.logps("reference", batch)
            if self.kl_in == "reward":
                k1 = where_says(batch.extra["sampler"] - batch.extra["reference_logps"], batch.scored).sum(dim=1)
                harvest.earned = harvest.earned - self.kl * k1.view_as(harvest.earned)
        if self.truncated == "penalise":
            harvest.earned = harvest.earned - self.penalty * harvest.truncated.view_as(harvest.earned).float()
        return harvest

    def weigh(self, batch: Batch) -> Tensor:
        scored, self._rows = batch.scored, len(batch)
        if self._idle:
            return torch.zeros(scored.shape)
        if self.loss in ("dapo", "cispo"):
            return token_mean_weights(scored)
        lengths = (
            scored.sum(dim=1, keepdim=True).clamp_min(1) if self.loss != "dr_grpo" else self.harvester.max_new_tokens
        )
        return scored.float() / lengths / len(batch)

    def terms(self, micro: Batch) -> Iterator[Term]:
        assert micro.weight is not None, "weigh comes before terms"
        scored, extra, temperature = micro.scored, micro.extra, self.harvester.temperature
        found = self.kit.roles.logps("policy", micro, temperature)
        logps, entropy = found.logps, found.entropy
        old = extra["sampler"] if self.old == "sampler" else extra.get("old", logps.detach())
        per_token, stopped = policy_loss(self.loss, logps, old, extra["advantage"], scored, self.low, self.high)
        stats = {"entropy": mean_over(entropy, scored), "clip_fraction": mean_over(stopped.float(), scored)}
        if self.kl and self.kl_in == "loss":
            if self.kl_estimator == "exact":
                penalty = self.kit.roles.exact_kl("policy", "reference", micro, temperature, gradient=True)
            else:
                penalty = kl_penalty(self.kl_estimator, logps, old, extra["reference_logps"], scored)
            per_token = per_token + self.kl * penalty
        if "reference_logps" in extra:
            stats["kl"] = mean_over(kl_penalty("k3", logps, old, extra["reference_logps"], scored), scored)
        if self._first_pass:
            stats["mismatch"] = mean_over((logps - extra["sampler"]).abs(), scored)
        loss = (where_says(per_token, scored) * where_says(micro.weight, scored)).sum()
        yield Term(loss, stats | {"loss": Mean(loss.detach(), len(micro) / self._rows)})

    def measure(self, micro: Batch) -> Stats:
        raise AssertionError("held-out rows of GRPO are questions, not rows")

    def observe(self, micro: Batch) -> Stats:
        if "reference_logps" in micro.extra:
            return {}  # the loss has it on every step
        return {
            "kl": mean_over(
                self.kit.roles.exact_kl("policy", "reference", micro, self.harvester.temperature), micro.scored
            )
        }

    def check(self, micro: Batch, step: int) -> None:
        if self.kit.fresh and step == 0:
            check_reference(self.kit.roles, micro, same=True, words=self.kit.reference)

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        if figures.get("mismatch", 0.0) > self.mismatch_limit:
            raise RunFailed(
                f"the sampler's log-probs and the policy's differ by {figures['mismatch']:.3f} nats a token, more than "
                f"grpo.mismatch_limit, {self.mismatch_limit:g}: ratios would compare what was never drawn"
            )
        yield from self.harvester.failures.warnings(self._lost, self._drawn)
        if self._first_reward is None and not math.isnan(figures["reward"]):
            self._first_reward = figures["reward"]
        first = math.inf if self._first_reward is None else self._first_reward
        # groups that all became right are no trouble
        if figures["dead_groups"] >= 0.8 and figures["reward"] <= first + RISEN:
            yield (
                f"most groups have equal rewards and teach nothing, {figures['dead_groups']:.0%} of this step's: the "
                f"task is too hard "
                "or too easy, or groups too small; look at the rewards, raise rollout.num_generations, or begin from "
                "an SFT "
                "adapter"
            )

    def go_on(self, stats: Stats) -> bool:
        self._first_pass = False
        return True

    def state(self) -> dict[str, float]:
        return self.harvester.failures.state()

    def restore(self, state: Mapping[str, float]) -> None:
        self.harvester.failures.restore(state)
