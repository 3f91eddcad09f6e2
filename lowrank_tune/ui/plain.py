"""The plain console: a line for each thing that happened. It reads the same in a terminal, in a pipe and in a log file."""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lowrank_tune.events import Event, Note, Progress, RunEnded, RunStarted, Sampled, Saved, StepDone, Validated
from lowrank_tune.ui import inert
from lowrank_tune.ui.metrics import POLICY, SIDES, WITHOUT_REFERENCE, heldout_parts, reward_names

_STYLES = {"warning": "33", "good": "32", "quiet": "2"}  # yellow, green, dim


def number(value: float) -> str:
    """Three decimals, or the exponent where those would show nothing."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1e5 or value != value else f"{value:.2e}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    return f"{value:+.3f}"


SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
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
    "score_errors": ("reward errors", "{:.0f}".format),
    "score_timeouts": ("reward timeouts", "{:.0f}".format),
    "": ("", str),  # statistics without a line here come in this place, under their own names
    "rollout_seconds": ("rollout", "{:.1f} s".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "memory_gib": ("memory", "{:.1f} GiB".format),
}
"""How a statistic is named and written, in the order of the line."""

UNSAID = {"logp_chosen", "logp_rejected", "chosen_change", "mismatch", "score_seconds", "heldout_stopped", "heldout_length",
          "heldout_repetition", "gold_noise", "value", "value_clip_fraction", "update_kl"}  # fmt: skip
"""What would make the line of a step too long, and says little by itself: the screen and the report draw it."""
ONLY_WHERE_ANY = {"bad_steps", "truncated", "clip_fraction", "score_errors", "score_timeouts"}
"""Said only where it is not 0."""
_PASS = re.compile(r"pass_at_(\d{1,6})")


def show(stats: Mapping[str, float]) -> str:
    """`loss 1.234  lr 2.0e-04 ...`; where completions are rewarded, that comes first, and the loss, which says nothing then, is left out."""
    parts, rewards, passes = [], reward_names(stats), {name: found[1] for name in stats if (found := _PASS.fullmatch(name))}
    others = [name for name in stats if name not in {*SHOWN, *UNSAID, *rewards, *passes}]
    for name, (label, write) in SHOWN.items():
        if name in UNSAID or (name == "loss" and "reward" in stats):
            continue
        if name == "pass":
            parts += [f"pass@{count} {percent(stats[each])}" for each, count in passes.items()]
        elif not name:
            parts += [f"{inert(other)} {number(stats[other])}" for other in others]
        elif name in stats and (name not in ONLY_WHERE_ANY or stats[name]):
            parts.append(f"{label} {write(stats[name])}")
        if name == "reward_spread":
            parts += [f"{inert(each.removeprefix('reward_'))} {number(stats[each])}" for each in rewards]
    return "  ".join(parts)


def validation_line(event: Validated, colon: str = "") -> str:
    """A validation in words: of held-out rows, of answers to held-out questions, or of scores of held-out pairs."""
    what, stats = "validation", {name.removeprefix("validation_"): value for name, value in event.stats.items()}
    if stats and all(name.startswith("pairs_") for name in stats):
        what, stats = "held-out pairs", {name.removeprefix("pairs_"): value for name, value in stats.items()}
    elif stats and all(name.startswith("heldout_") for name in stats):
        names = {name: heldout_parts(name) for name in stats}
        told = [f"the {POLICY}" if who == POLICY else who for who, _ in names.values()]
        what = f"held-out answers of {inert(', '.join(dict.fromkeys(told)), 60)}"
        stats = {names[name][1]: value for name, value in stats.items()}
    else:
        stats = {name.replace(f"heldout_{POLICY}_", "heldout_", 1): value for name, value in stats.items()}
    return f"{what} after step {event.step}{colon or '  '}{show(stats)}" + ("  best so far" if event.best else "")


def clock(seconds: float) -> str:
    """0:42, 12:05, 3:07:30."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """Wall time a step over the last fifth of the run: about two evaluations lie in it, so their pauses count too."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque()

    def left(self, event: StepDone) -> float:
        """Seconds until the last step."""
        if not self._marks or event.step <= self._marks[-1][0]:
            self._marks = deque([(event.step - 1, event.time - event.seconds)])
        self._marks.append((event.step, event.time))
        while len(self._marks) > max(20, event.steps // 5):
            self._marks.popleft()
        (first, since), (last, until) = self._marks[0], self._marks[-1]
        return (event.steps - last) * (until - since) / (last - first)


class Plain:
    """A sink that writes lines to `file`. Colours and bars only on a terminal; not one escape byte elsewhere; NO_COLOR is honoured."""

    def __init__(self, file: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self.file = sys.stdout if file is None else file
        self.terminal = self.file.isatty() and environ.get("TERM", "dumb") != "dumb"
        self._colour = self.terminal and not environ.get("NO_COLOR")
        self._pace = Pace()
        self._stage = ""  # of which stage of a chain a line tells that would say too little without it
        self._tokens, self._seconds = 0, 0.0
        self._bar: Bar | None = None
        self._task: tuple[str, TaskID] | None = None
        self._told: dict[str, tuple[float, float]] = {}  # of each job: the share and the time of its last line

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            if self.terminal:
                self._draw(event)
            else:
                self._sparse(event)
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, RunStarted):
            self._pace, self._tokens, self._seconds = Pace(), 0, 0.0
            self._started(event)
        elif isinstance(event, Validated):
            self._say(validation_line(event))
        elif isinstance(event, Sampled):
            self._sample(event)
        elif isinstance(event, Saved):
            self._say(f"saved {Path(event.path).name} ({event.seconds:.1f} s)", "quiet")
        elif isinstance(event, Note):
            prefix = "warning: " if event.level == "warning" else ""
            for i, line in enumerate(event.message.splitlines() or [""]):  # an indent shows that a line goes on
                self._say((prefix if i == 0 else "  ") + line, "warning" if prefix else "")
        elif isinstance(event, RunEnded):
            # Why it failed is what the run raises, and what the command line then prints.
            style = "good" if event.status == "done" else "warning"
            self._say(f"{self._stage}{event.status} after step {event.step} in {clock(event.seconds)}", style)

    def close(self) -> None:
        """Takes a bar off the screen, and gives the cursor back."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _say(self, text: str, style: str = "") -> None:
        self.close()
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        text = inert(text).encode(encoding, "backslashreplace").decode(encoding)  # a console in ASCII is no reason to stop a run
        if self._colour and style:
            text = f"\x1b[{_STYLES[style]}m{text}\x1b[0m"
        self.file.write(text + "\n")
        self.file.flush()

    def _started(self, event: RunStarted) -> None:
        where = f" on {event.device}" if event.device else ""
        trained = f"{event.trainable:,} trained parameters"
        self._stage = f"stage {event.stage} of {event.stages} " if event.stages > 1 else ""
        place = f", stage {event.stage} of {event.stages}" if event.stages > 1 else ""
        self._say(f"run {event.name}{place}: {event.algorithm} of {event.model}{where}, {event.steps} steps, {trained}")
        for role, stack in event.roles.items():
            if role == "reference":
                continue  # said in words below
            self._say(f"  {role}: {' + '.join(stack) or 'the base'}")
        if event.algorithm not in WITHOUT_REFERENCE:
            self._say(f"  reference: {event.reference}")
        if event.resumed_from:
            self._say(f"  continued after step {event.resumed_from}")

    def _step(self, event: StepDone) -> None:
        left = self._pace.left(event)
        self._tokens, self._seconds = self._tokens + event.tokens, self._seconds + event.seconds
        if not event.logged:
            return
        speed = {"tokens_per_second": self._tokens / self._seconds} if self._seconds else {}
        self._tokens, self._seconds = 0, 0.0
        width = len(str(event.steps))
        self._say(f"step {event.step:{width}d}/{event.steps}  {show({**speed, **event.stats})}  ETA {clock(left)}")

    def _sample(self, event: Sampled) -> None:
        if event.role in SIDES:  # one side of a pair and its score: how it was written is not the model's doing
            score = "" if event.reward is None else f"  [score {signed(event.reward)}]"
            return self._say(f"  {event.role:8} {inert(event.prompt, 60)} -> {inert(event.completion, 120)}{score}")
        facts = [event.finish]
        if event.gold is not None:
            facts.append(f"gold {inert(event.gold, 24)}")
        if event.reward is not None:
            facts.append(f"reward {number(event.reward)}")
        self._say(f"  {inert(event.prompt, 60)} -> {inert(event.completion, 120)}  [{', '.join(facts)}]")

    def _sparse(self, event: Progress) -> None:
        """At the end of a job; before it a line for each tenth, but at most every 5 s; and where a tenth takes long, every minute."""
        share = event.done / event.total if event.total else 1.0
        told, when = self._told.setdefault(event.what, (0.0, event.time))
        waited = event.time - when
        if event.done >= event.total:
            del self._told[event.what]
        elif (share - told >= 0.1 and waited >= 5) or (share > told and waited >= 60):
            self._told[event.what] = (share, event.time)
        else:
            return
        self._say(f"{event.what}: {event.done:,}/{event.total:,} ({100 * share:.0f} %)")

    def _draw(self, event: Progress) -> None:
        what = inert(event.what, 40)
        if self._bar is None or self._task is None or self._task[0] != what:
            self.close()
            # the console is told everything, since rich would otherwise read the process's own environment; drawn here, by no thread
            console = Console(file=self.file, force_terminal=True, no_color=not self._colour, highlight=False)
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._bar.start()
            self._task, self._told[what] = (what, self._bar.add_task(what, total=event.total)), (0.0, 0.0)
        over = event.done >= event.total
        self._bar.update(self._task[1], completed=event.done, total=event.total)
        if over or event.time - self._told[what][1] >= 0.1:
            self._told[what] = (0.0, event.time)
            self._bar.refresh()
        if over:
            self.close()


def summary_table(summary: Mapping[str, Any], folder: Path) -> str:
    """The end of a run or a chain in lines: how it ended, its metrics, held-out figures, warnings, and where everything lies. Inert."""
    lines = [f"status     {inert(str(summary.get('status', 'unknown')))}", *_figures_of(summary)]
    stages = [stage for stage in _listed(summary, "stages") if isinstance(stage, Mapping)]
    for stage in stages:
        lines += _stage_lines(stage)
    lines += _heldout_lines(summary)
    scored = {str(stage.get("name", "?")): stage.get("heldout_pairs") for stage in stages} or {"": summary.get("heldout_pairs")}
    lines += _pairs_lines(scored)
    lines += [f"warning    {inert(str(text), 200)}" for text in _listed(summary, "warnings")]
    lines.append(f"in         {inert(str(folder))}")
    places = {str(stage["folder"]): f"stage {inert(str(stage.get('name', '?')), 60)}: its own run folder, with its adapter in final"
              for stage in stages if isinstance(stage.get("folder"), str)}  # fmt: skip
    lines += [f"  {inert(name, 60):16} {what}" for name, what in {**places, **_PLACES}.items() if _lies(folder, name)]
    return "\n".join(lines)


def _listed(data: Mapping[str, Any], name: str) -> list[Any]:
    found = data.get(name)
    return found if isinstance(found, list) else []


def _lies(folder: Path, name: str) -> bool:
    try:
        return (folder / name).exists()
    except (OSError, ValueError):  # a name that is none
        return False


def _numbers(data: Any) -> dict[str, float]:
    """The numbers of an object that anyone may have edited."""
    if not isinstance(data, Mapping):
        return {}
    return {str(key): float(value) for key, value in data.items() if isinstance(value, (int, float))}


def _figures_of(summary: Mapping[str, Any]) -> list[str]:
    """Steps, seconds, the last and the best values of a run."""
    lines = []
    for name in ("step", "steps", "seconds"):
        if isinstance(value := summary.get(name), (int, float)):
            lines.append(f"{name:10} {clock(value) if name == 'seconds' else f'{value:,}'}")
    return lines + _last_and_best(summary)


def _last_and_best(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in ("last", "best"):
        if stats := _numbers(summary.get(name)):
            at = f"  (step {stats['step']:.0f})" if "step" in stats else ""
            lines.append(f"{name:10} {show({key: value for key, value in stats.items() if key != 'step'})}{at}")
    return lines


def _stage_lines(stage: Mapping[str, Any]) -> list[str]:
    """A stage of a chain: how it ended, and below it its last and best values."""
    name, algorithm, status = (inert(str(stage.get(key, "?")), 60) for key in ("name", "algorithm", "status"))
    numbers = _numbers({key: stage.get(key) for key in ("step", "steps", "seconds")})
    where = f", step {numbers['step']:,.0f} of {numbers['steps']:,.0f}" if {"step", "steps"} <= numbers.keys() else ""
    lasted = f" in {clock(numbers['seconds'])}" if "seconds" in numbers else ""
    return [f"{name:10} {algorithm}: {status}{where}{lasted}", *(f"  {line}" for line in _last_and_best(stage))]


def _heldout_lines(summary: Mapping[str, Any]) -> list[str]:
    heldout = summary.get("heldout")
    if not isinstance(heldout, Mapping) or not heldout:
        return []
    lines = ["held-out exact answers"]
    for who, value in heldout.items():
        shares = value if isinstance(value, Mapping) else {"": value}
        words = "  ".join(f"{key} {percent(share)}".strip() for key, share in shares.items() if isinstance(share, (int, float)))
        lines.append(f"  {inert(str(who), 60):12} {inert(words)}")
    return lines


def _pairs_lines(scored: Mapping[str, Any]) -> list[str]:
    """How well held-out pairs are told apart, by stage; `accuracy` is the share of pairs that are right."""
    found = {name: figures for name, value in scored.items() if (figures := _numbers(value))}
    lines = [f"  {f'{inert(name, 60):12} ' if name else ''}{show(figures)}" for name, figures in found.items()]
    return ["held-out pairs", *lines] if lines else []


_PLACES = {
    "final": "the adapter, to load, merge or export",
    "report.html": "curves, samples and warnings, for a browser",
    "summary.json": "this table for programs",
    "samples.jsonl": "what the model answered, step by step",
    "events.jsonl": "everything that was measured",
    "checkpoints": "where the run can be continued",
    "recipe.yaml": "the recipe, complete: it repeats the run",
    "console.log": "what libraries printed",
}
