"""Metrics for display: the charts of an algorithm, titles and descriptions of metrics, and the parts of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowrank_tune.events import RunStarted

Point = tuple[float, float]
Points = Sequence[Point]

CHARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (
        ("loss",),
        ("kl",),
        ("grad_norm",),
        ("learning_rate",),
        ("mean_token_accuracy",),
        ("entropy",),
    ),
    "reward": (
        ("loss",),
        ("accuracy",),
        ("score_chosen", "score_rejected"),
        ("margin",),
        ("grad_norm",),
        ("learning_rate",),
    ),
    "dpo": (
        ("loss",),
        ("rewards/chosen", "rewards/rejected"),
        ("rewards/accuracies",),
        ("kl",),
        ("logps_per_token/chosen", "logps_per_token/rejected"),
        ("rewards/margins",),
        ("grad_norm",),
        ("learning_rate",),
    ),
    "kto": (
        ("loss",),
        ("rewards/chosen", "rewards/rejected"),
        ("rewards/accuracies",),
        ("kl",),
        ("logps/chosen", "logps/rejected"),
        ("rewards/margins",),
        ("kl_per_token",),
        ("grad_norm",),
        ("learning_rate",),
    ),
    "grpo": (
        ("reward",),
        ("heldout/accuracy",),
        ("kl",),
        ("entropy",),
        ("completions/mean_length",),
        ("frac_reward_zero_std",),
        ("completions/clipped_ratio",),
        ("clip_ratio",),
        ("grad_norm",),
        ("learning_rate",),
        ("loss",),
    ),
    "ppo": (
        ("reward",),
        ("heldout/accuracy",),
        ("kl",),
        ("explained_variance",),
        ("value_loss",),
        ("entropy",),
        ("completions/mean_length",),
        ("completions/clipped_ratio",),
        ("kl_coef",),
        ("clip_ratio",),
        ("value_clip_ratio",),
        ("approx_kl",),
        ("grad_norm",),
        ("learning_rate",),
    ),
}
"""The charts of an algorithm, the most important first; a small screen shows the first ones. Two names are two lines in
one chart."""

TITLES = {
    "loss": "loss",
    "kl": "KL to the reference",
    "kl_per_token": "KL per token",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "score_chosen": "score",
    "rewards/chosen": "implicit reward",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "mean_token_accuracy": "accuracy",
    "completions/mean_length": "completion length",
    "completions/clipped_ratio": "truncated",
    "frac_reward_zero_std": "zero-std groups",
    "logps_per_token/chosen": "log-prob per token",
    "logps/chosen": "log-prob per answer",
    "heldout/accuracy": "held-out exact, pass@1",
    "kl_coef": "weight of the KL",
    "approx_kl": "KL within a step",
    "update_ratio": "update ratio",
    "updated_param_fraction": "changed share of the adapter",
    "tokens_per_second": "tokens per second",
    "memory_gib": "peak memory",
    "skipped_steps": "skipped steps",
    "overflowed_steps": "updates that exceeded float16",
    "loss_scale": "loss scale",
    "oom_retries": "retries after running out of memory",
    "router_aux_loss": "load-balancing loss of the routers",
    "heldout/eos_rate": "held-out, stops by itself",
    "heldout/mean_length": "held-out, tokens per answer",
    "heldout/repetition": "held-out, repetition",
    "logps/chosen_delta": "log-ratio of the chosen answers",
    "sampling/sampling_logp_difference/mean": "sampling minus training log-probs",
    "rollout_seconds": "seconds of rollouts",
    "reward_seconds": "seconds of rewards",
}
"""Titles of charts by the first of their metrics; the same in the dashboard, the report and the comparison."""
SIDE_TITLES = {
    "score_chosen": "score",
    "rewards/chosen": "reward",
    "logps_per_token/chosen": "log-prob",
    "logps/chosen": "log-prob",
}
"""Short titles of charts of pairs, which also show the last values of both sides."""

DEFAULT_ALGORITHM = "sft"
"""Assumed until the event `run_started` names the algorithm."""
KL_METRIC = {"kto": "kl_per_token"}
"""The KL to the reference per token, where it is not `kl`: TRL's KTOTrainer names its estimate so."""
WITHOUT_REFERENCE = ("reward",)
"""Algorithms that do not compare the model with a reference."""
PHASES = ("rollout", "reward", "update")
"""Phases of a step of an online algorithm: drawing completions, waiting for their rewards, and the rest."""
POLICY = "policy"
"""The model of held-out figures that are measured during training. Those of a stage are measured at its end."""
BAND_METRIC = {"reward": "reward_std"}
"""Metrics that are drawn with another one as a band around them."""

PAIR_SIDES = {"chosen": "chosen", "rejected": "rejected"}
SIDE_COUNTS = {
    "longer": "chosen is longer",
    "shorter": "chosen is shorter",
    "equal": "equally long",
}
"""Counts of pairs by the lengths of their sides, each with its label."""

DESCRIPTIONS = {
    "loss": "negative log-likelihood of the trained tokens, nats per token",
    "reward": "mean reward of the completions",
    "perplexity": "exp of the mean loss per token of the validation rows",
    "mean_token_accuracy": "share of trained tokens that are the model's first choice",
    "kl": "KL of the policy to its reference, nats per token",
    "entropy": "entropy of the prediction, nats",
    "grad_norm": "norm of the gradient before clipping",
    "learning_rate": "learning rate of the step",
    "update_ratio": "norm of the update divided by that of the weights",
    "updated_param_fraction": "share of the adapter that the last step changed",
    "tokens_per_second": "tokens of the step divided by its wall time",
    "memory_gib": "peak memory, GiB",
    "skipped_steps": "steps that were not finite and changed nothing",
    "overflowed_steps": "updates whose scaled gradient exceeded float16 and changed nothing",
    "loss_scale": "factor of the loss before its gradient is computed in float16",
    "oom_retries": "times the memory was exhausted; the work was repeated in parts",
    "router_aux_loss": "load-balancing loss of the routers, before its weight; k with k of all experts, used alike",
}
_HELDOUT_DESCRIPTIONS = {
    "heldout/accuracy": "share of held-out questions that the policy answers exactly (pass@1)",
    "heldout/eos_rate": "share of those answers that end by themselves",
    "heldout/mean_length": "tokens of such an answer",
    "heldout/repetition": "share of sequences of four words that the same answer had already",
}
_ROLLOUT_DESCRIPTIONS = {
    "completions/mean_length": "tokens of a completion",
    "completions/wasted_ratio": "share of drawn tokens after the ends of their completions, which are dropped",
    "sampling/sampling_logp_difference/mean": "difference between the log-probs of sampling and of training, "
    "nats per token; should be near 0",
    "entropy": "entropy of the policy, nats per token; near 0 its completions are all alike",
    "loss": "loss of the policy; with advantages around 0 its value has no meaning",
    "rollout_seconds": "seconds of a step for drawing completions",
    "reward_seconds": "seconds of a step for waiting for rewards",
    "reward_errors": "completions of a step on which a reward failed; they are removed from their groups",
    "reward_timeouts": "completions of a step on which a reward took too long; they are removed from their groups",
}
DESCRIPTIONS_BY_ALGORITHM = {
    "reward": {
        "loss": "negative log-probability that the chosen answer wins (Bradley-Terry), nats per pair; 0.693 is chance",
        "accuracy": "share of pairs whose chosen answer scores higher; a tie counts half",
        "score_chosen": "mean score of the chosen and of the rejected answers",
        "margin": "mean score of the chosen answers above the rejected",
    },
    "dpo": {
        "loss": "preference loss per pair; a sigmoid loss starts at 0.693",
        "rewards/accuracies": "share of pairs whose chosen answer gained more against the reference; a tie counts half",
        "rewards/chosen": "beta times the log-ratio to the reference; a chosen answer below 0 became less likely",
        "rewards/margins": "implicit reward of the chosen answers above the rejected",
        "logps_per_token/chosen": "log-probability of both sides under the policy, nats per token",
        "logps/chosen_delta": "log-probability of the chosen answers against the reference, nats per token; far below "
        "0 they are unlearned",
    },
    "kto": {
        "loss": "loss per answer, with the weight of its class; without weights it starts at 0.5",
        "rewards/accuracies": "share of answers that moved from the reference in the direction of their label; none "
        "counts half",
        "rewards/chosen": "beta times the log-ratio to the reference, of desirable (chosen) and undesirable (rejected) "
        "answers; a desirable answer below 0 became less likely",
        "rewards/margins": "implicit reward of the desirable answers above the undesirable",
        "logps/chosen": "log-probability of whole answers under the policy, of both classes",
        "logps/chosen_delta": "log-probability of the desirable answers against the reference, nats per token; far "
        "below 0 they are unlearned",
        "kl": "estimate of the KL to the reference from answers to other prompts, nats per answer; never below 0",
        "kl_per_token": "KL of the policy to its reference, nats per token",
    },
    "grpo": {
        "reward": "mean reward of the completions, without the KL",
        **_HELDOUT_DESCRIPTIONS,
        "reward_std": "standard deviation of the rewards within a group; near 0 there is nothing to learn from",
        "frac_reward_zero_std": "share of groups whose completions all have the same reward; they give no gradient",
        "completions/clipped_ratio": "share of completions that were cut off by the limit",
        "clip_ratio": "share of tokens where the clip stops the gradient",
        **_ROLLOUT_DESCRIPTIONS,
    },
    "ppo": {
        "reward": "mean reward of the completions, without penalties and without the KL",
        "scores": "reward at the last token: the reward minus the penalty of completions without an end",
        **_HELDOUT_DESCRIPTIONS,
        "kl_coef": "weight of the KL in the reward; it changes if a target is set",
        "approx_kl": "KL of the sampled policy to the policy after the passes of the step, nats per token",
        "value": "mean estimate of the value over the tokens",
        "value_loss": "half the squared error of the value",
        "explained_variance": "share of the variance of the returns that the value predicts; 1 is all, 0 no better "
        "than their mean, below 0 worse",
        "clip_ratio": "share of tokens where the clip stops the policy's gradient",
        "value_clip_ratio": "share of tokens where the clip stops the value's gradient",
        "reward_std": "standard deviation of the rewards of one prompt",
        "completions/clipped_ratio": "share of completions without an end, cut off by the limit",
        **_ROLLOUT_DESCRIPTIONS,
    },
}
"""Descriptions of metrics that an algorithm alone has, or that have another meaning there."""

PAIR_ACCURACY = {"reward": "accuracy", "dpo": "rewards/accuracies"}
PAIR_MARGIN = {"reward": "margin", "dpo": "rewards/margins"}
"""Metrics of preference pairs by algorithm. TRL's RewardTrainer and DPOTrainer name them differently."""

_HELDOUT = re.compile(r"heldout/(.+)/([^/]+)", re.DOTALL)
_REWARD_MEAN = re.compile(r"rewards/(.+)/mean", re.DOTALL)


def kl_metric(algorithm: str) -> str:
    """Returns the metric with the KL to the reference per token."""
    return KL_METRIC.get(algorithm, "kl")


def charts_of(algorithm: str) -> tuple[tuple[str, ...], ...]:
    return CHARTS.get(algorithm, CHARTS[DEFAULT_ALGORITHM])


def descriptions_of(algorithm: str) -> dict[str, str]:
    """Returns the description of each metric, in the order in which the report shows them."""
    own = DESCRIPTIONS_BY_ALGORITHM.get(algorithm, {})
    leading = [names[0] for names in CHARTS[algorithm]] if own else []
    descriptions = {**DESCRIPTIONS, **own}
    return {name: descriptions[name] for name in [*leading, *own, *DESCRIPTIONS] if name in descriptions}


def reward_names(names: Iterable[str]) -> list[str]:
    """Returns the metrics `rewards/NAME/mean`, which each of several rewards has."""
    return [name for name in names if _REWARD_MEAN.fullmatch(name)]


def reward_label(name: str) -> str:
    """Returns `NAME` of `rewards/NAME/mean`, and any other name unchanged."""
    match = _REWARD_MEAN.fullmatch(name)
    return match[1] if match else name


def chart_title(name: str) -> str:
    """Returns the title of a chart from the first of its metrics."""
    if name.startswith("eval_"):
        return f"validation {chart_title(name.removeprefix('eval_'))}"
    return TITLES.get(name) or metric_label(name)


def metric_label(name: str) -> str:
    """Returns the name of a metric without underscores and slashes."""
    return reward_label(name).replace("heldout", "held-out").replace("_", " ").replace("/", " ")


def phases_of(stats: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Returns the seconds of each phase of a step of `seconds`; empty if the step has no phases."""
    measured = []
    for phase in PHASES[:2]:
        value = stats.get(f"{phase}_seconds")
        # nan is refused as well
        if not isinstance(value, (int, float)) or not value >= 0:
            return {}
        measured.append(float(value))
    rollout, reward = measured
    return dict(
        zip(
            PHASES,
            (rollout, reward, max(0.0, seconds - rollout - reward)),
            strict=True,
        )
    )


def pair_side(name: str) -> str:
    """Returns `chosen` or `rejected` for a metric of one side of a pair, an empty string for any other."""
    return PAIR_SIDES.get(re.split(r"[_/]", name)[-1], "")


def paired_metric(algorithm: str, name: str) -> str | None:
    """Returns the metric that is the second line in the chart of `name`."""
    return next(
        (names[1] for names in charts_of(algorithm) if len(names) > 1 and names[0] == name),
        None,
    )


def heldout_parts(name: str) -> tuple[str, str]:
    """Returns the model and the figure of `heldout/MODEL/FIGURE`."""
    match = _HELDOUT.fullmatch(name)
    if match:
        return match[1], match[2]
    return name.removeprefix("heldout/"), ""


def reference_name(started: RunStarted | None) -> str:
    """Returns the name of the reference of a run: the last frozen adapter below the policy, or the base."""
    roles: Any = started.roles if started is not None else None
    stack = roles.get("reference") if isinstance(roles, dict) else None
    if isinstance(stack, list) and stack:
        return str(stack[-1])
    return "base"
