"""Figures in words: how a number, a statistic, a validation and the time that is left are written, wherever they are
shown."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping

from lowrank_tune.events import Evaluated, StepEnd
from lowrank_tune.ui import escape_control_chars
from lowrank_tune.ui.metrics import POLICY, heldout_parts, reward_names


def number(value: float) -> str:
    """Three decimals, or the exponent where those would show nothing."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1e5 or value != value else f"{value:.2e}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{value:+.3f}"


METRIC_FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {
    "reward": ("reward", number),
    "reward_spread": ("spread", number),
    "heldout_exact": ("held-out exact", percent),
    "loss": ("loss", number),
    "accuracy": ("accuracy", percent),
    "margin": ("margin", signed),
    "score_chosen": ("chosen", signed),
    "score_rejected": ("rejected", signed),
    "reward_chosen": ("chosen", signed),
    "reward_rejected": ("rejected", signed),
    "chosen_change": ("chosen a token", signed),
    "logp_chosen": ("chosen", number),
    "logp_rejected": ("rejected", number),
    "calibration_error": ("calibration error", percent),
    "length_correlation": ("length correlation", "{:+.2f}".format),
    "prefers_longer": ("prefers the longer", percent),
    "exact": ("exact", percent),
    "stopped": ("stopped", percent),
    "pass": ("pass", percent),
    "kl": ("kl", number),
    "length": ("length", "{:.1f}".format),
    "truncated": ("cut off", percent),
    "dead_groups": ("dead groups", percent),
    "score": ("score", number),
    "kl_coefficient": ("KL weight", number),
    "value_loss": ("value loss", number),
    "explained_variance": ("explained", "{:.2f}".format),
    "entropy": ("entropy", number),
    "clip_fraction": ("clipped", percent),
    "learning_rate": ("lr", "{:.1e}".format),
    "grad_norm": ("grad", number),
    "update_ratio": ("update", "{:.1e}".format),
    "moved_share": ("moved", percent),
    "bad_steps": ("skipped", "{:.0f}".format),
    "out_of_memory": ("short of memory", "{:.0f}".format),
    "score_errors": ("reward errors", "{:.0f}".format),
    "score_timeouts": ("reward timeouts", "{:.0f}".format),
    "": ("", str),  # statistics without a line here come in this place, under their own names
    "rollout_seconds": ("rollout", "{:.1f} s".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "memory_gib": ("memory", "{:.1f} GiB".format),
}
"""How a statistic is named and written, in the order of the line."""

HIDDEN_METRICS = {
    "logp_chosen",
    "logp_rejected",
    "chosen_change",
    "mismatch",
    "score_seconds",
    "heldout_stopped",
    "heldout_length",
    "heldout_repetition",
    "gold_noise",
    "value",
    "value_clip_fraction",
    "update_kl",
}
"""What would make the line of a step too long, and says little by itself: the screen and the report draw it."""
NONZERO_ONLY_METRICS = {"bad_steps", "out_of_memory", "truncated", "clip_fraction", "score_errors", "score_timeouts"}
"""Said only where it is not 0."""
_PASS = re.compile(r"pass_at_(\d{1,6})")


def format_stats(stats: Mapping[str, float]) -> str:
    """`loss 1.234  lr 2.0e-04 ...`; where completions are rewarded, that comes first, and the loss, which says nothing
    then, is left out."""
    parts, rewards, passes = (
        [],
        reward_names(stats),
        {name: match[1] for name in stats if (match := _PASS.fullmatch(name))},
    )
    others = [name for name in stats if name not in {*METRIC_FORMATS, *HIDDEN_METRICS, *rewards, *passes}]
    for name, (label, write) in METRIC_FORMATS.items():
        if name in HIDDEN_METRICS or (name == "loss" and "reward" in stats):
            continue
        if name == "pass":
            parts += [f"pass@{count} {percent(stats[each])}" for each, count in passes.items()]
        elif not name:
            parts += [f"{escape_control_chars(other)} {number(stats[other])}" for other in others]
        elif name in stats and (name not in NONZERO_ONLY_METRICS or stats[name]):
            parts.append(f"{label} {write(stats[name])}")
        if name == "reward_spread":
            parts += [f"{escape_control_chars(each.removeprefix('reward_'))} {number(stats[each])}" for each in rewards]
    return "  ".join(parts)


def validation_line(event: Evaluated, colon: str = "") -> str:
    """A validation in words: of held-out rows, of answers to held-out questions, or of scores of held-out pairs."""
    what, stats = "validation", {name.removeprefix("validation_"): value for name, value in event.stats.items()}
    if stats and all(name.startswith("pairs_") for name in stats):
        what, stats = "held-out pairs", {name.removeprefix("pairs_"): value for name, value in stats.items()}
    elif stats and all(name.startswith("heldout_") for name in stats):
        names = {name: heldout_parts(name) for name in stats}
        models = [f"the {POLICY}" if who == POLICY else who for who, _ in names.values()]
        what = f"held-out answers of {escape_control_chars(', '.join(dict.fromkeys(models)), 60)}"
        stats = {names[name][1]: value for name, value in stats.items()}
    else:
        stats = {name.replace(f"heldout_{POLICY}_", "heldout_", 1): value for name, value in stats.items()}
    return f"{what} after step {event.step}{colon or '  '}{format_stats(stats)}" + (
        "  best so far" if event.best else ""
    )


def clock(seconds: float) -> str:
    """0:42, 12:05, 3:07:30."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class EtaEstimator:
    """Wall time a step over the last fifth of the run: about two evaluations lie in it, so their pauses count too."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque()

    def seconds_left(self, event: StepEnd) -> float:
        """Seconds until the last step."""
        if not self._marks or event.step <= self._marks[-1][0]:
            self._marks = deque([(event.step - 1, event.time - event.seconds)])
        self._marks.append((event.step, event.time))
        while len(self._marks) > max(20, event.steps // 5):
            self._marks.popleft()
        (first, since), (last, until) = self._marks[0], self._marks[-1]
        return (event.steps - last) * (until - since) / (last - first)
