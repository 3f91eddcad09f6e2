"""PPO: proximal policy optimisation (arXiv:1707.06347) as it is used on language (arXiv:1909.08593, arXiv:2203.02155).

The policy writes completions y; old is that policy, ref the reference. Of token t, over the tokens y_1 ... y_n of one
completion:

    r_t = -lambda (log old(y_t) - log ref(y_t)),   and r_n also has the score R(x, y) A_t = delta_t + gamma L A_(t+1),
    delta_t = r_t + gamma V_(t+1) - V_t,   G_t = A_t + V_t          GAE, L its `gae_lambda` a_t = (A_t - mean A) / std A
    over all tokens of the harvest

    policy   L = sum_t w_t [ -min(rho a, clip(rho, 1 - c, 1 + c) a) - e H ],   rho_t = p(y_t) / old(y_t), H the entropy
    value    L = sum_t w_t max((v_t - G_t)^2, (clip(v_t, V_t - d, V_t + d) - G_t)^2) / 2

w is 1 / (tokens of the minibatch). V_t is the value of what stands before token t; V_(n+1) is 0 where the completion
ended. One that was cut loses `penalty` (truncated `penalise`), is scored as it is (`keep`), or has no score yet and
V_(n+1) is the value of all that was written (`bootstrap`). A harvest is passed over `epochs` times in `minibatches`;
once old and policy lie `update_kl_limit` nats a token apart the rest of the passes is left out.

The value is an adapter and an fp32 head of its own beside the policy's adapter, or a head on the policy's trunk. The
two losses are two graphs, one alive at a time: no parameter moves between their backward passes, so the gradients add
up to those of one joint backward, also where the trunk is shared. lambda is fixed, or follows the KL to a target
(arXiv:1909.08593, equation 4), a step at a time.

Metrics: `reward` R before penalties, `reward_NAME` each reward by itself; `score` what stands at the last token; `kl`
to the reference and `update_kl` to old, nats a token, k3; `kl_coefficient` lambda; `value_loss`; `explained_variance`
of G by V; `value` mean V; `clip_fraction` and `value_clip_fraction` the share of tokens where the clip stops the
gradient; `entropy` nats; `length` tokens a completion; `truncated` the share without an end; `mismatch` mean |log old -
log p_sampler|; `loss` the policy's L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_tune.algorithms.failures import Unscored
from lowrank_tune.algorithms.harvest import Harvester, in_micro_batches
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.step_zero import check_reference
from lowrank_tune.errors import RunFailed
from lowrank_tune.maths import explained_variance, gae, mean_over, step_seed, token_mean_weights, where_says, whiten
from lowrank_tune.types import Batch, Experience, Mean, Stats, Term

MOST_ERROR = 0.2  # arXiv:1909.08593: a KL far off moves the coefficient no faster than one that is 20 % off
MOSTLY_CUT = 0.8
PASSES = 15  # tag of the seed that mixes minibatches; draws of a step are numbered from 0


def token_rewards(old: Tensor, reference: Tensor, says: Tensor, score: Tensor, coefficient: float) -> Tensor:
    """old, reference, says (B, T), score (B,) -> what each token earns (B, T): minus its KL, and at the row's last
    token the score."""
    rewards = -coefficient * where_says(old - reference, says)
    last = says & (says.long().flip(1).cumsum(dim=1).flip(1) == 1)
    return rewards + where_says(score[:, None].to(rewards.dtype).expand_as(rewards), last)


def policy_loss(logps: Tensor, old: Tensor, advantages: Tensor, says: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """logps, old, advantages, says (B, T) -> the loss of each token and whether the clip stopped its gradient; (B, T)
    each."""
    advantages = where_says(advantages, says)
    ratio = where_says(logps - old, says).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    stopped = (clipped * advantages < ratio * advantages) & says
    return where_says(-torch.minimum(ratio * advantages, clipped * advantages), says), stopped


def value_loss(values: Tensor, old: Tensor, returns: Tensor, says: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """values, old, returns, says (B, T) -> the loss of each token and whether the clip stopped its gradient; clip 0 for
    none."""
    values, old, returns = (where_says(each, says) for each in (values, old, returns))
    plain = (values - returns).square() / 2
    if not clip:
        return plain, torch.zeros_like(says)
    clipped = (torch.minimum(torch.maximum(values, old - clip), old + clip) - returns).square() / 2
    return torch.maximum(plain, clipped), (clipped > plain) & says


def k3(logps: Tensor, other: Tensor, says: Tensor) -> Tensor:
    """KL(p || other) of each token from one draw of p: e^d - d - 1, d = log other - log p; never negative, (B, T)."""
    d = where_says(other - logps, says)
    return torch.expm1(d) - d


def next_coefficient(coefficient: float, kl: float, target: float, gain: float) -> float:
    """The KL's weight in the next step: up where the KL is above its target, down where it is below (arXiv:1909.08593,
    equation 4)."""
    return coefficient * (1 + gain * max(-MOST_ERROR, min(MOST_ERROR, kl / target - 1)))


@dataclass
class Passes(Experience):
    """The harvest `epochs` times, each time in other `minibatches` of nearly the same number of rows."""

    epochs: int = 1
    minibatches: int = 1
    seed: int = 0

    def parts(self) -> Iterator[Batch]:
        for epoch in range(self.epochs):
            if self.minibatches == 1:
                yield self.batch
                continue
            stream = torch.Generator().manual_seed(step_seed(self.seed, epoch))
            for rows in torch.randperm(len(self.batch), generator=stream).tensor_split(self.minibatches):
                if len(rows):
                    yield self.batch.take(rows.sort().values)


@dataclass
class Critic:
    """What the value is: a role with a scalar head, and how much its loss counts."""

    weight: float = 1.0
    clip: float = 0.2
    role: str = "value"


@dataclass
class Discount:
    """How rewards are handed back to the tokens before: GAE's two numbers, and what becomes of a completion that was
    cut."""

    gamma: float = 1.0
    lam: float = 0.95
    truncated: str = "penalise"
    penalty: float = 1.0


@dataclass
class Leash:
    """What holds the policy: lambda, by choice towards a KL in nats a token, and how far one step's passes may go."""

    kl: float = 0.05
    target: float | None = None
    gain: float = 0.1
    update_limit: float | None = None


@dataclass
class Update:
    """How a harvest is learned from: the policy's clip, the weight of the entropy, passes and minibatches."""

    clip: float = 0.2
    entropy: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    mismatch_limit: float = 0.1


@dataclass
class PPO:
    """The three verbs."""

    kit: Kit
    harvester: Harvester
    critic: Critic = field(default_factory=Critic)
    discount: Discount = field(default_factory=Discount)
    leash: Leash = field(default_factory=Leash)
    update: Update = field(default_factory=Update)
    together: int = 1
    coefficient: float = field(init=False)
    """lambda of the next step."""
    _rows: int = field(init=False, default=1)
    _idle: bool = field(init=False, default=False)
    _drawn: int = field(init=False, default=0)
    _lost: list[Unscored] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.coefficient = self.leash.kl

    def collect(self, step: int) -> Experience:
        harvest = self.harvester.draw(step, 0)
        self._drawn, self._lost = len(harvest.unscored), [one for one in harvest.unscored if one is not None]
        told = harvest.scored.flatten()
        self._idle = not bool(told.any())  # then there is nothing to learn, and the step weighs nothing
        rows = torch.arange(len(told)) if self._idle else told.nonzero().squeeze(1)
        batch = harvest.batch if len(rows) == len(told) else harvest.batch.take(rows)
        says = batch.scored
        old, reference = self.harvester.logps("policy", batch), self.harvester.logps("reference", batch)
        mismatch = mean_over((old - batch.extra["sampler"]).abs(), says)
        self._check_sampler(mismatch.value)
        values, written = self._values(batch)
        score, after = self._outcomes(harvest.earned.flatten()[rows].nan_to_num(0.0), harvest.truncated[rows], written)
        earned = token_rewards(old, reference, says, score, self.coefficient)
        advantages = gae(earned, values, says, after, self.discount.gamma, self.discount.lam)
        returns, white = where_says(values, says) + advantages, whiten(advantages, says)
        batch.extra |= {"old": old, "values": values, "returns": returns, "advantages": white}
        kl = mean_over(k3(old, reference, says), says)
        stats = (
            harvest.stats()
            | self.harvester.failures.stats(self._lost)
            | {
                "score": Mean(score.sum(), len(score)),
                "kl": kl,
                "kl_coefficient": Mean(self.coefficient, 1),
                "mismatch": mismatch,
                "value": mean_over(values, says),
            }
        )
        if (explained := explained_variance(values, returns, says)) == explained:  # no number where all returns are one
            stats["explained_variance"] = Mean(explained, 1)
        shown = torch.zeros(len(told)).index_copy(0, rows, white.sum(dim=1) / says.sum(dim=1).clamp_min(1))
        self.harvester.show(step, harvest, shown.view_as(harvest.rewards))
        if self.leash.target is not None and kl.count:
            self.coefficient = next_coefficient(self.coefficient, kl.value, self.leash.target, self.leash.gain)
        return Passes(
            batch, stats, self.update.epochs, self.update.minibatches, self.harvester.seed_of(16 * step + PASSES)
        )

    def _check_sampler(self, mismatch: float) -> None:
        if mismatch > self.update.mismatch_limit:
            raise RunFailed(
                f"the sampler's log-probs and the policy's differ by {mismatch:.3f} nats a token, more than "
                f"ppo.mismatch_limit, {self.update.mismatch_limit:g}: ratios would compare what was never drawn"
            )

    def _outcomes(self, score: Tensor, cut: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """The score at each row's last token, and the value behind it; (B,) each. `written` is the value of all that
        was written."""
        nothing = torch.zeros_like(written)
        if self.discount.truncated == "bootstrap":  # the outcome is still to come, and the value stands for it
            return torch.where(cut, torch.zeros_like(score), score), torch.where(cut, written, nothing)
        return score - self.discount.penalty * cut.double() if self.discount.truncated == "penalise" else score, nothing

    def _values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The value before each token (B, T), and behind the last one (B,); no gradient, on the CPU."""
        roles, (rows, columns) = self.kit.roles, batch.ids.shape
        states = torch.zeros(rows, columns)

        def read(units: Sequence[int]) -> Tensor:
            here = slice(units[0], units[-1] + 1)
            part = Batch(batch.ids[here], batch.attended[here], batch.says[here]).to(roles.base.device)
            with roles.quiet():
                return roles.scores(self.critic.role, part).cpu()

        for units, found in in_micro_batches(roles, rows, columns, self.harvester.micro_tokens, read):
            states[units[0] : units[-1] + 1] = found
        return before_each(states), states.gather(1, (batch.lengths - 1).clamp_min(0)[:, None]).squeeze(1)

    def weigh(self, batch: Batch) -> Tensor:
        self._rows = len(batch)
        return torch.zeros(batch.ids.shape) if self._idle else token_mean_weights(batch.scored)

    def terms(self, micro: Batch) -> Iterator[Term]:
        yield self._policy_term(micro)
        yield self._value_term(micro)

    def _policy_term(self, micro: Batch) -> Term:
        assert micro.weight is not None, "weigh comes before terms"
        says, extra, bonus = micro.scored, micro.extra, self.update.entropy
        found = self.kit.roles.logps("policy", micro, self.harvester.temperature, entropy_gradient=bonus > 0)
        per_token, stopped = policy_loss(found.logps, extra["old"], extra["advantages"], says, self.update.clip)
        if bonus:
            per_token = per_token - bonus * where_says(found.entropy, says)
        loss = (per_token * where_says(micro.weight, says)).sum()
        return Term(
            loss,
            {
                "loss": Mean(loss.detach(), len(micro) / self._rows),
                "entropy": mean_over(found.entropy, says),
                "clip_fraction": mean_over(stopped.float(), says),
                "update_kl": mean_over(k3(extra["old"], found.logps, says), says),
            },
        )

    def _value_term(self, micro: Batch) -> Term:
        assert micro.weight is not None, "weigh comes before terms"
        says, extra = micro.scored, micro.extra
        values = before_each(self.kit.roles.scores(self.critic.role, micro))
        per_token, stopped = value_loss(values, extra["values"], extra["returns"], says, self.critic.clip)
        loss = self.critic.weight * (per_token * where_says(micro.weight, says)).sum()
        return Term(
            loss, {"value_loss": mean_over(per_token, says), "value_clip_fraction": mean_over(stopped.float(), says)}
        )

    def measure(self, micro: Batch) -> Stats:
        raise AssertionError("held-out rows of PPO are questions, not rows")

    def observe(self, micro: Batch) -> Stats:
        return {}  # every step has its KL

    def check(self, micro: Batch, step: int) -> None:
        if self.kit.fresh and step == 0:
            check_reference(self.kit.roles, micro, same=True, words=self.kit.reference)

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        yield from self.harvester.failures.warnings(self._lost, self._drawn)
        if figures["truncated"] > MOSTLY_CUT:
            yield (
                f"most completions have no end, {figures['truncated']:.0%} of this step's: what they earn is not "
                f"what whole answers earn; "
                "raise rollout.max_new_tokens, or begin from an SFT adapter that ends its answers"
            )

    def go_on(self, stats: Stats) -> bool:
        return self.leash.update_limit is None or not stats["update_kl"].value > self.leash.update_limit

    def state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient, **self.harvester.failures.state()}

    def restore(self, state: Mapping[str, float]) -> None:
        self.coefficient = state["coefficient"]
        self.harvester.failures.restore(state)


def before_each(states: Tensor) -> Tensor:
    """Values of what stands up to each token -> of what stands before it, which is the state that it was written in;
    (B, T)."""
    return torch.nn.functional.pad(states[:, :-1], (1, 0))
