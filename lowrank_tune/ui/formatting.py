"""Figures in words: numbers, times, statistics, validations and the time that is left."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from lowrank_tune.events import Evaluated, RunEnded, RunStarted, StepEnd
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.metrics import (
    POLICY,
    heldout_parts,
    metric_label,
    reward_label,
    reward_names,
)


def number(value: float) -> str:
    """Returns a number with three decimals, or with an exponent if it is too small or too large for them."""
    if value == 0 or 0.01 <= abs(value) < 1e5 or value != value:
        return f"{value:.3f}"
    return f"{value:.2e}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def percent_tick(value: float) -> str:
    """Returns a share in percent, as charts label their axes."""
    return f"{100 * value:.4g} %"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def format_tick(value: float) -> str:
    """Returns a number in at most four digits, as charts label their axes."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        if abs(value) < 1000:
            return f"{value:,.4g}"
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_large(count: int) -> str:
    """Returns a count in three digits with its unit: `1.23 M`; one below a thousand as it is."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,500 is 1 M in three digits
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def format_age(seconds: float) -> str:
    """Returns how long ago something was in its largest unit: `12 s`, `5 min`, `3 h` or `40 d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size):,} {unit}"
    return f"{max(0, int(seconds))} s"


def plural(count: int, noun: str) -> str:
    """Returns `1 step` or `2 steps`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def format_time(timestamp: float) -> str:
    """Returns date and time of a Unix timestamp in UTC, `unknown` if it is outside of the range of dates."""
    try:
        return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "unknown"


def rate(per_second: float) -> str:
    """Returns a speed without decimals, `-` if it is unknown, as without a clock that advances."""
    return f"{per_second:,.0f}" if math.isfinite(per_second) else "-"


METRIC_FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "reward": ("reward", number),
    "reward_std": ("spread", number),
    "heldout/accuracy": ("held-out exact", percent),
    "heldout/eos_rate": ("EOS", percent),
    "heldout/mean_length": ("length", "{:.1f}".format),
    "heldout/repetition": ("repetition", percent),
    "loss": ("loss", number),
    "perplexity": ("perplexity", number),
    "accuracy": ("accuracy", percent),
    "mean_token_accuracy": ("accuracy", percent),
    "rewards/accuracies": ("accuracy", percent),
    "margin": ("margin", signed),
    "rewards/margins": ("margin", signed),
    "score_chosen": ("chosen", signed),
    "score_rejected": ("rejected", signed),
    "rewards/chosen": ("chosen", signed),
    "rewards/rejected": ("rejected", signed),
    "logps/chosen_delta": ("chosen a token", signed),
    "logps/chosen": ("log-prob chosen", number),
    "logps/rejected": ("log-prob rejected", number),
    "logps_per_token/chosen": ("chosen", number),
    "logps_per_token/rejected": ("rejected", number),
    "calibration_error": ("calibration error", percent),
    "length_correlation": ("length correlation", "{:+.2f}".format),
    "prefers_longer": ("prefers the longer", percent),
    "eos_rate": ("EOS", percent),
    "pass": ("pass", percent),
    "kl": ("kl", number),
    "kl_per_token": ("kl a token", number),
    "completions/mean_length": ("length", "{:.1f}".format),
    "mean_length": ("length", "{:.1f}".format),
    "completions/clipped_ratio": ("truncated", percent),
    "completions/wasted_ratio": ("wasted", percent),
    "frac_reward_zero_std": ("zero std", percent),
    "scores": ("score", number),
    "kl_coef": ("KL weight", number),
    "value_loss": ("value loss", number),
    "explained_variance": ("explained", "{:.2f}".format),
    "entropy": ("entropy", number),
    "router_aux_loss": ("router", number),
    "clip_ratio": ("clipped", percent),
    "value_clip_ratio": ("value clipped", percent),
    "approx_kl": ("KL within a step", number),
    "learning_rate": ("lr", "{:.1e}".format),
    "grad_norm": ("grad", number),
    "update_ratio": ("update", "{:.1e}".format),
    "updated_param_fraction": ("moved", percent),
    "skipped_steps": ("skipped", "{:.0f}".format),
    "overflowed_steps": ("overflowed", "{:.0f}".format),
    "loss_scale": ("loss scale", "{:.0f}".format),
    "oom_retries": ("short of memory", "{:.0f}".format),
    "reward_errors": ("reward errors", "{:.0f}".format),
    "reward_timeouts": ("reward timeouts", "{:.0f}".format),
    "": (
        "",
        str,
    ),  # the place of all other statistics, under their own names
    "rollout_seconds": ("rollout", "{:.1f} s".format),
    "tokens_per_second": ("tokens/s", rate),
    "memory_gib": ("memory", "{:.1f} GiB".format),
}
"""Label and format of each statistic, in the order of the line."""


HIDDEN_METRICS = {
    "logps_per_token/chosen",
    "logps_per_token/rejected",
    "logps/chosen_delta",
    "sampling/sampling_logp_difference/mean",
    "reward_seconds",
    "completions/wasted_ratio",
    "heldout/eos_rate",
    "heldout/mean_length",
    "heldout/repetition",
    "heldout_accuracy_stderr",
    "value",
    "value_clip_ratio",
    "approx_kl",
    "loss_scale",
}
"""Left out of the line of a step, which would become too long; the screen and the report draw them."""
NONZERO_ONLY_METRICS = {
    "skipped_steps",
    "overflowed_steps",
    "oom_retries",
    "completions/clipped_ratio",
    "clip_ratio",
    "reward_errors",
    "reward_timeouts",
}
"""Left out if they are 0."""
_PASS = re.compile(r"pass_at_(\d{1,6})")


def is_share(name: str) -> bool:
    """Returns whether a metric, of steps or of a validation, is a share, which is shown in percent."""
    return _format_of(name)[1] is percent


def format_metric(name: str, value: float) -> str:
    """Returns the value of a metric, of steps or of a validation, with its unit."""
    return _format_of(name)[1](value)


def short_label(name: str) -> str:
    """Returns a metric in one to three words, such as `validation loss` for `eval_loss`; the name in words if it has no
    label."""
    label = _format_of(name)[0] or metric_label(name)
    return f"validation {label}" if name.startswith("eval_") else label


def _format_of(name: str) -> tuple[str, Callable[[float], str]]:
    return METRIC_FORMATS.get(name.removeprefix("eval_"), ("", number))


def format_stats(stats: Mapping[str, float]) -> str:
    """Returns statistics in one line: `loss 1.234  lr 2.0e-04 ...`.

    A reward comes first. The loss is left out beside it, because with advantages around 0 it has no meaning.
    """
    rewards = reward_names(stats)
    passes = {name: match[1] for name in stats if (match := _PASS.fullmatch(name))}
    known = {
        *METRIC_FORMATS,
        *HIDDEN_METRICS,
        *rewards,
        *passes,
    }
    parts = list[str]()
    for name, (label, write) in METRIC_FORMATS.items():
        if name in HIDDEN_METRICS or (name == "loss" and "reward" in stats):
            continue
        if name == "pass":
            parts += [f"pass@{count} {percent(stats[metric])}" for metric, count in passes.items()]
        elif not name:
            parts += _numbers(stats, [metric for metric in stats if metric not in known])
        elif name in stats and (name not in NONZERO_ONLY_METRICS or stats[name]):
            parts.append(f"{label} {write(stats[name])}")
        if name == "reward_std":
            parts += _numbers(stats, rewards)
    return "  ".join(parts)


def _numbers(stats: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [f"{escape_control_chars(reward_label(name))} {number(stats[name])}" for name in names]


def validation_line(event: Evaluated, colon: str = "") -> str:
    """Returns a validation in one line: of validation rows, of answers to held-out questions, or of scores of held-out
    pairs."""
    label, stats = _label_validation({name.removeprefix("eval_"): value for name, value in event.stats.items()})
    # of equal answers the latest are the best, but none right is not worth a mention
    is_best = event.best and event.stats.get(f"heldout/{POLICY}/accuracy") != 0
    best = "  best so far" if is_best else ""
    return f"{label} after step {event.step}{colon or '  '}{format_stats(stats)}{best}"


def _label_validation(stats: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    """Returns what was validated, and its statistics without the prefix of their names."""
    if stats and all(name.startswith("pairs/") for name in stats):
        return "held-out pairs", {name.removeprefix("pairs/"): value for name, value in stats.items()}
    if not stats or not all(name.startswith("heldout/") for name in stats):
        own = f"heldout/{POLICY}/"
        return "validation", {name.replace(own, "heldout/", 1): value for name, value in stats.items()}
    models = dict[str, None]()
    metrics = dict[str, float]()
    for name, value in stats.items():
        who, metric = heldout_parts(name)
        models[f"the {POLICY}" if who == POLICY else who] = None
        metrics[metric] = value
    return (
        f"held-out answers of {escape_control_chars(', '.join(models), 60)}",
        metrics,
    )


def stage_of(event: RunEnded, started: RunStarted | None) -> tuple[int, int]:
    """Returns which stage ended, and the number of stages.

    Only its own event names a stage that failed before its `RunStarted`. A `RunEnded` of an older version has no stage;
    then the last `RunStarted` names it.
    """
    source = event if event.stages > 1 or started is None else started
    return source.stage, source.stages


def clock(seconds: float) -> str:
    """Returns a duration as 0:42, 12:05 or 3:07:30."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def wall_time(seconds: float, sessions: int) -> str:
    """Returns the wall time of a run as `3:07:30 (3 sessions)`; a single session is not named."""
    if sessions > 1:
        return f"{clock(seconds)} ({sessions} sessions)"
    return clock(seconds)


def ended_time(event: RunEnded) -> str:
    """Returns the wall time of all sessions at the end of one; of an older version, that of this one."""
    if event.total_seconds is None:
        return clock(event.seconds)
    return wall_time(event.total_seconds, event.sessions)


class EtaEstimator:
    """Estimates the time left from the wall time per step over the last fifth of the run, which contains about two
    evaluations."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque()

    def seconds_left(self, event: StepEnd) -> float:
        """Returns the seconds until the last step."""
        if not self._marks or event.step <= self._marks[-1][0]:
            self._marks = deque([(event.step - 1, event.time - event.seconds)])
        self._marks.append((event.step, event.time))
        while len(self._marks) > max(20, event.steps // 5):
            self._marks.popleft()
        first_step, first_time = self._marks[0]
        last_step, last_time = self._marks[-1]
        steps_left = event.steps - last_step
        return steps_left * (last_time - first_time) / (last_step - first_step)
