"""DPO: direct preference optimisation (arXiv:2305.18290, equation 7) and its relatives, by name.

    a+ = log p(y+ | x) - log ref(y+ | x)      a- = log p(y- | x) - log ref(y- | x)      d = a+ - a-
    L = 1/P sum over pairs loss(d) + s (1/N) sum over the N tokens of all chosen answers of -log p

    sigmoid       -log sigmoid(beta d) ipo           (d' - 1 / (2 beta))^2
    arXiv:2310.12036, equation 17; d' from log-probs a token hinge         max(0, 1 - beta d)
    SLiC, arXiv:2305.10425 robust        (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)
    arXiv:2403.00409, e the label smoothing apo_zero      1 - sigmoid(beta a+) + sigmoid(beta a-)
    arXiv:2408.06266 sigmoid_norm  -log sigmoid(beta d')                                            length-normalised:
    each side divided by its tokens

log p(y | x) sums over the answer's tokens, its end tokens included. The reference is the policy's stack without its
top; its log-probs belong to the data and come with the rows (`extra["reference"]`, (B,)). Rows come as chosen,
rejected, chosen, rejected, and a pair stays in one micro-batch; P and N count the whole optimizer step, so no split
changes the gradient.

Metrics: `loss` is the preference loss without the SFT term; `reward_chosen` and `reward_rejected` are beta a+ and beta
a-, `margin` their difference, `accuracy` the share of pairs where it is positive (a tie counts half); `logp_chosen` and
`logp_rejected` in nats a token; `chosen_change` is a+ in nats a token; `kl` is KL(policy || reference) a token over the
whole vocabulary, on one micro-batch of a logging step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.step_zero import check_reference
from lowrank_tune.maths import mean_of, mean_over, pair_weights, share_right, token_mean_weights, where_says
from lowrank_tune.types import Batch, Experience, Mean, Stats, Term

COLLAPSED, IN_A_ROW = -0.5, 3
"""Nats a token by which the chosen answers may become less likely than under the reference, for so many steps, before a
person is told."""


def dpo_loss(
    kind: str,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    label_smoothing: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> Tensor:
    """Log-ratios a+ and a- (P,), tokens of the answers (P,) -> losses (P,)."""
    difference = chosen - rejected
    if kind in ("ipo", "sigmoid_norm"):
        difference = chosen / chosen_tokens.clamp_min(1) - rejected / rejected_tokens.clamp_min(1)
    match kind:
        case "sigmoid" | "sigmoid_norm":
            return -F.logsigmoid(beta * difference)
        case "ipo":
            return (difference - 1 / (2 * beta)).square()
        case "hinge":
            return torch.relu(1 - beta * difference)
        case "robust":
            right, wrong = F.logsigmoid(beta * difference), F.logsigmoid(-beta * difference)
            return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    raise AssertionError(f"no DPO loss is called {kind}")


class DPO:
    """The three verbs. `sft` is the weight s of the SFT term."""

    together = 2

    def __init__(
        self, kit: Kit, loss: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0, sft: float = 0.0
    ) -> None:
        self.kit, self.loss, self.beta, self.label_smoothing, self.sft = kit, loss, beta, label_smoothing, sft
        self._collapsed = 0  # steps in a row

    def collect(self, step: int) -> Experience:
        batch = self.kit.rows(step)
        if self.sft:
            batch.extra["sft_weight"] = token_mean_weights(_on_chosen(batch.scored))
        return Experience(batch)

    def weigh(self, batch: Batch) -> Tensor:
        return pair_weights(batch.ids)

    def scores(self, micro: Batch) -> Tensor:
        """(B,) the implicit reward of each row: beta times its log-ratio to the reference."""
        return self.beta * (self.kit.roles.logps("policy", micro).logps.sum(dim=1) - micro.extra["reference"])

    def terms(self, micro: Batch) -> Iterator[Term]:
        assert micro.weight is not None, "weigh comes before terms"
        losses, logps, stats = self._losses(micro)
        loss = (losses * micro.weight[::2]).sum()
        if self.sft:
            loss = loss - self.sft * (where_says(logps, micro.scored) * micro.extra["sft_weight"]).sum()
        yield Term(loss, stats)

    def measure(self, micro: Batch) -> Stats:
        return self._losses(micro)[2]

    def _losses(self, micro: Batch) -> tuple[Tensor, Tensor, Stats]:
        """Losses (P,), log-probs (B, T), and the figures."""
        scored = micro.scored
        logps = self.kit.roles.logps("policy", micro).logps
        ratio, tokens = logps.sum(dim=1) - micro.extra["reference"], scored.sum(dim=1)
        chosen, rejected = ratio[::2], ratio[1::2]
        losses = dpo_loss(self.loss, chosen, rejected, self.beta, self.label_smoothing, tokens[::2], tokens[1::2])
        stats = {
            "loss": mean_of(losses),
            "accuracy": share_right(chosen - rejected),
            "margin": mean_of(self.beta * (chosen - rejected)),
            "reward_chosen": mean_of(self.beta * chosen),
            "reward_rejected": mean_of(self.beta * rejected),
            "logp_chosen": mean_over(logps[::2], scored[::2]),
            "logp_rejected": mean_over(logps[1::2], scored[1::2]),
            "chosen_change": Mean(chosen.detach().sum(), tokens[::2].sum()),
        }
        return losses, logps, stats

    def observe(self, micro: Batch) -> Stats:
        return {"kl": mean_over(self.kit.roles.exact_kl("policy", "reference", micro), micro.scored)}

    def check(self, micro: Batch, step: int) -> None:
        check_reference(self.kit.roles, micro, same=self.kit.fresh and step == 0, words=self.kit.reference)

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        self._collapsed = self._collapsed + 1 if figures["chosen_change"] < COLLAPSED else 0
        if self._collapsed >= IN_A_ROW:
            yield (
                f"the chosen answers have become less likely than under the reference, by "
                f"{-figures['chosen_change']:.2f} nats a token: "
                "the margin grows because both sides are unlearned; raise dpo.beta, lower train.learning_rate, or "
                "set dpo.sft"
            )

    def go_on(self, stats: Stats) -> bool:
        return True

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state, "dpo keeps no state"


def _on_chosen(mask: Tensor) -> Tensor:
    """(B, T) bool: the mask on the chosen rows, the even ones, alone."""
    is_chosen = torch.arange(len(mask), device=mask.device) % 2 == 0
    return mask & is_chosen[:, None]
