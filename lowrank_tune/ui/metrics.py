"""What is measured, for people: which charts an algorithm has, what a figure means there, and what a validation's
figures belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

CHARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("loss",), ("kl",), ("grad_norm",), ("learning_rate",), ("accuracy",), ("entropy",)),
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
        ("reward_chosen", "reward_rejected"),
        ("accuracy",),
        ("kl",),
        ("logp_chosen", "logp_rejected"),
        ("margin",),
        ("grad_norm",),
        ("learning_rate",),
    ),
    "grpo": (
        ("reward",),
        ("heldout_exact",),
        ("kl",),
        ("entropy",),
        ("length",),
        ("dead_groups",),
        ("truncated",),
        ("clip_fraction",),
        ("grad_norm",),
        ("learning_rate",),
        ("loss",),
    ),
    "ppo": (
        ("reward",),
        ("heldout_exact",),
        ("kl",),
        ("explained_variance",),
        ("value_loss",),
        ("entropy",),
        ("length",),
        ("truncated",),
        ("kl_coefficient",),
        ("clip_fraction",),
        ("value_clip_fraction",),
        ("update_kl",),
        ("grad_norm",),
        ("learning_rate",),
    ),
}
"""The charts of an algorithm, the most telling first: what a small screen shows. Two names are two lines in one
chart."""

TITLES = {
    "loss": "loss",
    "kl": "KL to the reference",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "score_chosen": "score",
    "reward_chosen": "implicit reward",
    "logp_chosen": "log-prob a token",
    "heldout_exact": "held-out exact, greedy",
    "kl_coefficient": "weight of the KL",
    "update_kl": "KL within a step",
}
"""Of a chart, by its first name."""
SIDE_TITLES = {"score_chosen": "score", "reward_chosen": "reward", "logp_chosen": "log-prob"}
"""Where both sides and their last values have to stand in few cells."""

WITHOUT_REFERENCE = ("reward",)
"""Algorithms that compare the model with nothing."""
GENERATIVE_ALGORITHMS = ("grpo", "ppo")
"""Algorithms that learn from what the policy writes: their steps have phases, and groups to look at."""
PHASES = ("rollout", "score", "update")
"""Of a step of such an algorithm: drawing completions, waiting for their rewards, and the rest."""
POLICY = "policy"
"""Who answers held-out questions while it is trained. It is no stage: what a stage came to is measured at its end."""
BAND_METRIC = {"reward": "reward_spread"}
"""Statistics that are drawn with another one as a band around them."""

PAIR_SIDES = {"chosen": "chosen", "rejected": "rejected"}

DESCRIPTIONS = {
    "loss": "negative log-likelihood of what is trained, nats a token",
    "reward": "mean reward of the completions",
    "accuracy": "share of trained tokens that were the first choice",
    "kl": "how far the policy is from its reference, nats a token",
    "entropy": "how undecided the prediction is, nats",
    "grad_norm": "length of the gradient before clipping",
    "learning_rate": "the step's rate",
    "update_ratio": "length of the update over that of the weights",
    "moved_share": "share of the adapter that the last step changed",
    "tokens_per_second": "tokens of the step by its wall time",
    "memory_gib": "peak memory, GiB",
    "bad_steps": "steps that were not finite and changed nothing",
    "out_of_memory": "times that memory ran short; the work was done again in parts",
}
DESCRIPTIONS_BY_ALGORITHM = {
    "reward": {
        "loss": "minus the log-probability that the chosen answer wins (Bradley-Terry), nats a pair; 0.693 is a coin's",
        "accuracy": "share of pairs whose chosen answer scores higher; a tie counts half",
        "score_chosen": "mean score of the chosen and of the rejected answers",
        "margin": "mean score of the chosen answers above the rejected",
    },
    "dpo": {
        "loss": "the preference loss, a pair; 0.693 is where a sigmoid loss begins",
        "accuracy": "share of pairs whose chosen answer gained more against the reference; a tie counts half",
        "reward_chosen": "beta times the log-ratio to the reference; a chosen answer below 0 became less likely",
        "margin": "implicit reward of the chosen answers above the rejected",
        "logp_chosen": "how likely the policy finds both sides, nats a token",
        "chosen_change": "log-probability of the chosen answers against the reference, nats a token; far below 0 "
        "they are unlearned",
    },
    "grpo": {
        "reward": "mean reward of the completions, before any KL is taken off",
        "heldout_exact": "share of held-out questions that the policy answers exactly, greedily (pass@1)",
        "heldout_stopped": "share of those answers that end by themselves",
        "heldout_length": "tokens of such an answer",
        "heldout_repetition": "share of sequences of four words that the same answer had already",
        "reward_spread": "how far rewards within a group lie apart (standard deviation); near 0 there is nothing to "
        "learn from",
        "length": "tokens of a completion",
        "dead_groups": "share of groups whose completions all earn the same; they teach nothing",
        "truncated": "share of completions that the limit cut off",
        "clip_fraction": "share of tokens where the clip stops the gradient",
        "mismatch": "how far the log-probs of sampling and of training lie apart, nats a token; should be near 0",
        "entropy": "how undecided the policy is, nats a token; near 0 it tries nothing new",
        "loss": "the policy's loss; with advantages around 0 it says little",
        "rollout_seconds": "seconds of a step in which completions were drawn",
        "score_seconds": "seconds of a step spent waiting for rewards",
        "score_errors": "completions of a step on which a reward failed; they leave their groups",
        "score_timeouts": "completions of a step on which a reward took too long; they leave their groups",
    },
    "ppo": {
        "reward": "mean reward of the completions, before penalties and before any KL is taken off",
        "score": "what stands at the last token: the reward, less the penalty of completions without an end",
        "heldout_exact": "share of held-out questions that the policy answers exactly, greedily (pass@1)",
        "heldout_stopped": "share of those answers that end by themselves",
        "heldout_length": "tokens of such an answer",
        "heldout_repetition": "share of sequences of four words that the same answer had already",
        "kl_coefficient": "weight of the KL in the reward; it moves where a target is set",
        "update_kl": "how far a step's passes move the policy from the one that wrote, nats a token",
        "value": "what the value expects, in the mean over tokens",
        "value_loss": "squared error of the value, halved",
        "explained_variance": "share of what the returns vary that the value foretells; 1 is all, 0 no more than "
        "their mean, below 0 harm",
        "clip_fraction": "share of tokens where the clip stops the policy's gradient",
        "value_clip_fraction": "share of tokens where the clip stops the value's gradient",
        "reward_spread": "how far rewards of one prompt lie apart (standard deviation)",
        "length": "tokens of a completion",
        "truncated": "share of completions without an end: the limit cut them off",
        "mismatch": "how far the log-probs of sampling and of training lie apart, nats a token; should be near 0",
        "entropy": "how undecided the policy is, nats a token; near 0 it tries nothing new",
        "loss": "the policy's loss; with advantages around 0 it says little",
        "rollout_seconds": "seconds of a step in which completions were drawn",
        "score_seconds": "seconds of a step spent waiting for rewards",
        "score_errors": "completions of a step on which a reward failed; they leave their groups",
        "score_timeouts": "completions of a step on which a reward took too long; they leave their groups",
    },
}
"""Where an algorithm means something else by a name, or has names of its own."""

_HELDOUT = re.compile(r"heldout_(.+)_(exact|stopped|length|repetition|pass_at_\d+)", re.DOTALL)


def charts_of(algorithm: str) -> tuple[tuple[str, ...], ...]:
    return CHARTS.get(algorithm, CHARTS["sft"])


def descriptions_of(algorithm: str) -> dict[str, str]:
    """What each statistic means, in the order in which a reader wants them."""
    own = DESCRIPTIONS_BY_ALGORITHM.get(algorithm, {})
    leading = [names[0] for names in CHARTS[algorithm]] if own else []
    descriptions = {**DESCRIPTIONS, **own}
    return {name: descriptions[name] for name in [*leading, *own, *DESCRIPTIONS] if name in descriptions}


def reward_names(names: Iterable[str]) -> list[str]:
    """Of several rewards each one's own statistic: `reward_NAME`."""
    return [
        name
        for name in names
        if name.startswith("reward_") and name not in ("reward_spread", "reward_chosen", "reward_rejected")
    ]


def phases_of(stats: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Seconds of each phase of a step; nothing where the step has none."""
    measured = [stats.get(f"{phase}_seconds") for phase in PHASES[:2]]
    if not all(isinstance(value, (int, float)) and value >= 0 for value in measured):
        return {}
    rollout, score = (float(value) for value in measured if value is not None)
    return dict(zip(PHASES, (rollout, score, max(0.0, seconds - rollout - score)), strict=True))


def pair_side(name: str) -> str:
    """`chosen` or `rejected`, where a statistic is about one side of a pair; else nothing."""
    return PAIR_SIDES.get(name.rpartition("_")[2], "")


def paired_metric(algorithm: str, name: str) -> str | None:
    """The statistic that shares a chart with this one as its second line."""
    return next((names[1] for names in charts_of(algorithm) if len(names) > 1 and names[0] == name), None)


def heldout_parts(name: str) -> tuple[str, str]:
    """Of `heldout_my_sft_exact`: who answered (`my_sft`), and what was measured (`exact`)."""
    if match := _HELDOUT.fullmatch(name):
        return match[1], match[2]
    who, _, what = name.removeprefix("heldout_").partition("_")
    return who, what


def reference_name(roles: Any) -> str:
    """Who the reference of these roles is, by name: the last frozen adapter under the policy, or the base."""
    stack = roles.get("reference") if isinstance(roles, dict) else None
    return str(stack[-1]) if isinstance(stack, list) and stack else "base"
