"""Reference losses of DPO, KTO, reward models, GRPO and PPO, in plain Python and float64: formulas of the papers, with
derivatives worked out by hand. Nothing here calls the package.

Every loss returns its value and its derivatives with respect to the log-probs (or values) that it is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from models import saved_model
from torch import Tensor
from transformers import AutoModelForCausalLM


def sigmoid(x: float) -> float:
    """Returns 1 / (1 + e^-x)."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """Returns log(1 + e^x) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# --- DPO --------------------------------------------------------------------------------------------------------------


def dpo(
    loss_type: str,
    chosen_logratio: float,
    rejected_logratio: float,
    beta: float,
    label_smoothing: float = 0.0,
    num_tokens: tuple[int, int] = (1, 1),
) -> tuple[float, float, float]:
    """Returns the loss of one pair, and its derivatives by both log-ratios. `num_tokens` are the lengths of the chosen
    and the rejected answer.

    Sources: sigmoid arXiv:2305.18290, equation 7; ipo arXiv:2310.12036, equation 17, with log-ratios per token; hinge
    arXiv:2305.10425; robust arXiv:2403.00409; apo_zero arXiv:2408.06266; sigmoid_norm is sigmoid with log-ratios per
    token.
    """
    if loss_type == "apo_zero":
        chosen_reward = beta * chosen_logratio
        rejected_reward = beta * rejected_logratio
        loss = 1 - sigmoid(chosen_reward) + sigmoid(rejected_reward)
        chosen_slope = -beta * sigmoid(chosen_reward) * sigmoid(-chosen_reward)
        rejected_slope = beta * sigmoid(rejected_reward) * sigmoid(-rejected_reward)
        return loss, chosen_slope, rejected_slope
    chosen_tokens, rejected_tokens = num_tokens if loss_type in ("ipo", "sigmoid_norm") else (1, 1)
    difference = chosen_logratio / chosen_tokens - rejected_logratio / rejected_tokens
    loss, slope = _dpo_of_difference(loss_type, difference, beta, label_smoothing)
    return loss, slope / chosen_tokens, -slope / rejected_tokens


def _dpo_of_difference(loss_type: str, difference: float, beta: float, label_smoothing: float) -> tuple[float, float]:
    """Returns a loss of d = a+ - a-, and its derivative by d."""
    x = beta * difference
    e = label_smoothing
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return softplus(-x), -beta * sigmoid(-x)
    if loss_type == "ipo":
        return (difference - 1 / (2 * beta)) ** 2, 2 * (difference - 1 / (2 * beta))
    if loss_type == "hinge":
        return max(0.0, 1 - x), (-beta if x < 1 else 0.0)
    assert loss_type == "robust"
    loss = ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e)
    slope = -beta * ((1 - e) * sigmoid(-x) + e * sigmoid(x)) / (1 - 2 * e)
    return loss, slope


@dataclass
class DPOStep:
    """A whole step: its loss, the derivative by the log-prob of each scored token (row, position), and the metrics of
    each pair."""

    loss: float
    slopes: dict[tuple[int, int], float]
    metrics: dict[str, list[float]]


def dpo_step(
    logps: Sequence[Sequence[float]],
    masks: Sequence[Sequence[bool]],
    reference_logps: Sequence[float],
    loss_type: str,
    beta: float,
    label_smoothing: float,
    sft_coef: float,
) -> DPOStep:
    """Returns DPO with its SFT term over rows chosen, rejected, chosen, rejected, ... of token log-probs;
    `reference_logps` are sums of whole answers. A first token is never scored."""
    scored = [[t for t, in_mask in enumerate(mask) if in_mask and t > 0] for mask in masks]
    num_pairs = len(logps) // 2
    num_chosen_tokens = sum(len(positions) for positions in scored[::2])
    step = DPOStep(0.0, {(row, t): 0.0 for row, positions in enumerate(scored) for t in positions}, {})
    for chosen in range(0, len(logps), 2):
        rejected = chosen + 1
        chosen_logratio, rejected_logratio = (
            sum(logps[row][t] for t in scored[row]) - reference_logps[row] for row in (chosen, rejected)
        )
        num_tokens = len(scored[chosen]), len(scored[rejected])
        loss, chosen_slope, rejected_slope = dpo(
            loss_type, chosen_logratio, rejected_logratio, beta, label_smoothing, num_tokens
        )
        step.loss += loss / num_pairs
        for row, slope in ((chosen, chosen_slope), (rejected, rejected_slope)):
            for t in scored[row]:
                step.slopes[row, t] += slope / num_pairs
        for t in scored[chosen]:
            step.loss -= sft_coef * logps[chosen][t] / num_chosen_tokens
            step.slopes[chosen, t] -= sft_coef / num_chosen_tokens
        difference = chosen_logratio - rejected_logratio
        for name, value in (
            ("loss", loss),
            ("rewards/accuracies", 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0),
            ("rewards/margins", beta * difference),
            ("rewards/chosen", beta * chosen_logratio),
            ("rewards/rejected", beta * rejected_logratio),
        ):
            step.metrics.setdefault(name, []).append(value)
    return step


# --- KTO --------------------------------------------------------------------------------------------------------------


def kto(loss_type: str, logratio: float, is_desirable: bool, kl: float, beta: float) -> tuple[float, float]:
    """Returns the loss of one row without its weight, and its derivative by the log-ratio (arXiv:2402.01306, equation
    7; apo_zero_unpaired: arXiv:2408.06266)."""
    z0 = kl if loss_type == "kto" else 0.0
    x = beta * (logratio - z0)
    slope = beta * sigmoid(x) * sigmoid(-x)
    if is_desirable:
        return sigmoid(-x), -slope
    return sigmoid(x), slope


# --- reward model -----------------------------------------------------------------------------------------------------


def reward_pair(chosen: float, rejected: float, margin: float, centering: float) -> tuple[float, float, float]:
    """Returns the Bradley-Terry loss of one pair of scores (arXiv:2203.02155, equation 1) with the centering term of
    arXiv:2312.09244, and its derivatives by both scores."""
    difference = chosen - rejected - margin
    level = chosen + rejected
    centering_slope = 2 * centering * level
    loss = softplus(-difference) + centering * level**2
    return loss, -sigmoid(-difference) + centering_slope, sigmoid(-difference) + centering_slope


# --- policy gradients -------------------------------------------------------------------------------------------------


def clipped_surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """Returns PPO's loss of one token, -min(ratio A, clip(ratio) A) (arXiv:1707.06347, equation 7), and its derivative
    by log p; by cases."""
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def kl_estimate(estimator: str, logp: float, old_logp: float, reference_logp: float) -> tuple[float, float]:
    """Returns the KL term of one token, and its derivative by log p. `exact` is not a function of these: 0."""
    d = reference_logp - logp
    k3 = math.exp(d) - d - 1
    k3_slope = 1 - math.exp(d)
    ratio = math.exp(logp - old_logp)
    match estimator:
        case "k3":
            return k3, k3_slope
        case "k3_ratio":
            return k3 * ratio, ratio * (k3 + k3_slope)
        case "k2":
            return d * d / 2, -d
    return 0.0, 0.0


@dataclass(frozen=True)
class PolicyRow:
    """Log-probs of the tokens of one completion."""

    logps: Sequence[float]
    old_logps: Sequence[float]
    reference_logps: Sequence[float]


@dataclass
class GRPOStep:
    """A whole step: its loss, its derivatives by the log-probs of each row, and the weight of a token of each row."""

    loss: float
    slopes: list[list[float]]
    weights: list[float]


def grpo_step(
    loss_type: str,
    rows: Sequence[PolicyRow],
    advantages: Sequence[float],
    low: float,
    high: float,
    beta: float,
    estimator: str,
    max_new_tokens: int,
) -> GRPOStep:
    """Returns GRPO (arXiv:2402.03300, equation 3) and its variants over the completions of a step: dapo
    arXiv:2503.14476, dr_grpo arXiv:2503.20783, gspo arXiv:2507.18071, cispo arXiv:2506.13585."""
    num_tokens = sum(len(row.logps) for row in rows)
    step = GRPOStep(0.0, [], [])
    for row, advantage in zip(rows, advantages, strict=True):
        length = len(row.logps)
        if loss_type in ("dapo", "cispo"):
            weight = 1 / max(1, num_tokens)
        elif loss_type == "dr_grpo":
            weight = 1 / (len(rows) * max_new_tokens)
        else:
            weight = 1 / (len(rows) * max(1, length))
        log_ratios = [logp - old for logp, old in zip(row.logps, row.old_logps, strict=True)]
        mean_log_ratio = sum(log_ratios) / max(1, length)
        slopes = []
        for t, log_ratio in enumerate(log_ratios):
            # gspo: each token moves the ratio of its sequence by 1 / length, and that ratio is in `length` equal terms.
            ratio = math.exp(mean_log_ratio if loss_type == "gspo" else log_ratio)
            if loss_type == "cispo":
                loss = -min(ratio, high) * advantage * row.logps[t]
                slope = -min(ratio, high) * advantage
            else:
                loss, slope = clipped_surrogate(ratio, advantage, low, high)
            kl, kl_slope = kl_estimate(estimator, row.logps[t], row.old_logps[t], row.reference_logps[t])
            step.loss += weight * (loss + beta * kl)
            slopes.append(weight * (slope + beta * kl_slope))
        step.slopes.append(slopes)
        step.weights.append(weight)
    return step


def group_advantages(rewards: Iterable[Sequence[float]], scale_by_std: bool = True) -> list[list[float]]:
    """Returns (R - mean R) / (std R + 1e-4) of each group, with the population's standard deviation."""
    advantages = []
    for group in rewards:
        centered = np.asarray(group, dtype=np.float64) - np.mean(group)
        advantages.append((centered / (np.std(group) + 1e-4) if scale_by_std else centered).tolist())
    return advantages


def gae(rewards: Sequence[float], values: Sequence[float], bootstrap: float, gamma: float, lam: float) -> list[float]:
    """Returns GAE by its definition (arXiv:1506.02438, equation 16): A_t = sum over l of (gamma lam)^l delta_(t+l),
    delta_t = r_t + gamma V_(t+1) - V_t."""
    next_values = [*values[1:], bootstrap][: len(values)]
    deltas = [
        reward + gamma * next_value - value
        for reward, value, next_value in zip(rewards, values, next_values, strict=True)
    ]
    return [sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(values))]


def clipped_value_loss(value: float, old_value: float, target: float, cliprange: float) -> tuple[float, float]:
    """Returns max((v - G)^2, (clip(v) - G)^2) / 2 of one token, and its derivative by v; `cliprange` 0 for none."""
    clipped = min(max(value, old_value - cliprange), old_value + cliprange) if cliprange else value
    if (clipped - target) ** 2 > (value - target) ** 2:
        return (clipped - target) ** 2 / 2, 0.0
    return (value - target) ** 2 / 2, value - target


@dataclass(frozen=True)
class PPORow:
    """The numbers that both losses are computed from, one for each token of a completion."""

    logps: Sequence[float]
    old_logps: Sequence[float]
    advantages: Sequence[float]
    values: Sequence[float]
    old_values: Sequence[float]
    returns: Sequence[float]


@dataclass
class PPOStep:
    """Both losses, with derivatives by the log-probs and by the values of all tokens in order."""

    policy_loss: float
    policy_slopes: list[float]
    value_loss: float
    value_slopes: list[float]


def ppo_step(rows: Sequence[PPORow], cliprange: float, cliprange_value: float, weight: float) -> PPOStep:
    """Returns both losses of PPO, each token with the same weight."""
    step = PPOStep(0.0, [], 0.0, [])
    for row in rows:
        for t in range(len(row.logps)):
            ratio = math.exp(row.logps[t] - row.old_logps[t])
            loss, slope = clipped_surrogate(ratio, row.advantages[t], cliprange, cliprange)
            step.policy_loss += weight * loss
            step.policy_slopes.append(weight * slope)
            loss, slope = clipped_value_loss(row.values[t], row.old_values[t], row.returns[t], cliprange_value)
            step.value_loss += weight * loss
            step.value_slopes.append(weight * slope)
    return step


# --- the model --------------------------------------------------------------------------------------------------------


class PlainModel:
    """The model of transformers in float64, one row at a time and without padding. Adapters are matrices that are added
    to its weights."""

    def __init__(
        self, frozen: Sequence[dict[str, Tensor]] = (), trained: dict[str, Tensor] | None = None, scale: float = 4.0
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(saved_model(), dtype=torch.float64).eval()
        self.scale = scale
        self.frozen = [{key: tensor.double() for key, tensor in adapter.items()} for adapter in frozen]
        self.trained = {key: tensor.double().requires_grad_() for key, tensor in (trained or {}).items()}

    def _weights_with(self, adapters: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        weights = dict(self.model.named_parameters())
        for adapter in adapters:
            for key, lora_a in adapter.items():
                if key.endswith(".lora_A.weight"):
                    name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                    lora_b = adapter[key.replace("lora_A", "lora_B")]
                    weights[name] = weights[name] + self.scale * lora_b @ lora_a
        return weights

    def run(self, ids: Sequence[int], policy: bool = True) -> Any:
        """Returns the outputs for one row; with `policy` False without the trained adapter."""
        adapters = [*self.frozen, self.trained] if policy else self.frozen
        arguments = {"input_ids": torch.tensor([list(ids)]), "use_cache": False, "output_hidden_states": True}
        return torch.func.functional_call(self.model, self._weights_with(adapters), kwargs=arguments)

    def log_softmax(self, ids: Sequence[int], policy: bool = True, temperature: float = 1.0) -> Tensor:
        """Returns the log-probs of the token after each position, (T, V)."""
        return torch.log_softmax(self.run(ids, policy).logits[0] / temperature, dim=1)

    def sequence_logp(self, ids: Sequence[int], mask: Sequence[bool], policy: bool = True) -> Tensor:
        """Returns the sum of the log-probs of the scored tokens."""
        logps = self.log_softmax(ids, policy)
        scored = [t for t, in_mask in enumerate(mask) if in_mask and t > 0]
        return sum((logps[t - 1, ids[t]] for t in scored), torch.zeros((), dtype=torch.float64))

    def score(self, ids: Sequence[int]) -> Tensor:
        """Returns the scalar head of the trained adapter at the last token."""
        return self.run(ids).hidden_states[-1][0, -1] @ self.trained["base_model.model.score.weight"][0]

    def gradient(self) -> dict[str, Tensor]:
        """Returns the gradients of the trained adapter, under the names of PEFT's files."""
        return {key: tensor.grad for key, tensor in self.trained.items() if tensor.grad is not None}
