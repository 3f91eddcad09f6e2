"""`lowrank-tune eval`: base and tuned voices from the same weights on held-out questions and tasks, and the record that
is kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune import settings
from lowrank_tune.data import Template
from lowrank_tune.errors import UserError
from lowrank_tune.evals import harness
from lowrank_tune.evals.figures import Figures, changes_of, figures_of, lost, wins_of
from lowrank_tune.evals.intervals import LEVEL
from lowrank_tune.evals.marking import Marking
from lowrank_tune.evals.measure import Measured, Meter
from lowrank_tune.evals.questions import Asked, own_questions, questions_on, source_of
from lowrank_tune.evals.record import EVALS, VERSION
from lowrank_tune.evals.subject import (
    BASE,
    Judge,
    Subject,
    check_bases,
    check_judge,
    device_name,
    judge_of,
    roles_for,
    subject_of,
)
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.model.base import Base, load_base, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Sampling

PROMPTS, NEW_TOKENS = 100, 256  # where no recipe says


@dataclass(frozen=True)
class Options:
    """What a person asked for; None is what the run's recipe says, or a default where there is no recipe."""

    on: str | None = None
    name: str | None = None
    split: str | None = None
    num_prompts: int | None = None
    samples: int | None = None
    k: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int | None = None
    verifier: str | None = None
    judge: Path | None = None
    confidence: float = LEVEL
    bits: Literal[4, 16] | None = None
    tasks: tuple[str, ...] = ()
    tasks_path: Path | None = None
    limit: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Drawn:
    """How answers are drawn, settled."""

    num_prompts: int
    samples: int
    ks: tuple[int, ...]
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_prompts,
            "samples": self.samples,
            "k": list(self.ks),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }


@dataclass
class Evaluation:
    """What came of it: `record` is the line of `evals.jsonl`, `path` where it belongs (None for a model that is no
    run)."""

    record: dict[str, Any]
    path: Path | None
    interrupted: bool = False


def settled(options: Options, recipe: settings.Recipe | None) -> Drawn:
    """Fills in what was not asked for. Raises UserError for what contradicts itself."""
    wanted = recipe.evaluate if recipe is not None else settings.Evaluate(prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    samples = options.samples or wanted.samples
    temperature = options.temperature if options.temperature is not None else wanted.temperature if samples > 1 else 0.0
    if samples > 1 and temperature == 0:
        raise UserError("--samples: greedy answers are all the same; leave it out, or give a --temperature above 0")
    if options.top_p < 1 and temperature == 0:
        raise UserError("--top-p does nothing to greedy answers; give a --temperature above 0 too")
    ks = tuple(sorted({1, *(options.k or (samples,))}))
    if ks[-1] > samples:
        raise UserError(f"--k {ks[-1]} needs as many answers to a prompt: --samples {ks[-1]} (here it is {samples})")
    longest = options.max_new_tokens or _longest(recipe, wanted)
    seed = options.seed if options.seed is not None else recipe.seed if recipe is not None else 0
    return Drawn(options.num_prompts or wanted.prompts, samples, ks, temperature, options.top_p, longest, seed)


def _longest(recipe: settings.Recipe | None, wanted: settings.Evaluate) -> int:
    """Held-out answers as the run drew them; where it had none, as it drew its completions."""
    online = recipe is not None and recipe.algorithm in ("grpo", "ppo") and wanted.heldout is None
    return recipe.rollout.max_new_tokens if recipe is not None and online else wanted.max_new_tokens


def evaluate(given: str, options: Options, emit: Emit, device: torch.device | None = None) -> Evaluation:
    """Measures a run, a chain, an adapter or a model. Ctrl-C keeps what was measured. Raises UserError, what is cheap
    to check first."""
    manager: Any = None
    if options.tasks:
        manager = harness.known(options.tasks, options.tasks_path)
    elif options.tasks_path is not None or options.limit is not None:
        raise UserError("--tasks-path and --limit belong to --tasks, which is not given")
    if (options.name or options.split) and options.on is None:
        raise UserError("--name and --split say which part of --on, which is not given")
    subject = subject_of(given, options.bits, emit)
    drawn = settled(options, subject.recipe)
    judge = judge_of(options.judge) if options.judge is not None else None
    if judge is not None:
        check_judge(subject, judge)
    template = Template.of(load_tokenizer(subject.base))
    asks = options.on is not None or not options.tasks
    asked = _questions(subject, options, drawn, template, emit) if asks else Asked([], "")
    recipe = subject.recipe if asks else None
    with Marking(recipe, options.verifier if asks else None, judge is not None, template) as marking:
        base = _load(subject, template, device, emit)
        check_bases(subject, judge, base, emit)
        roles = roles_for(subject, judge, base)
        marking.attach(roles)
        return _Work(subject, options, drawn, asked, judge, manager, emit).do(roles, base, template, marking)


def _load(subject: Subject, template: Template, device: torch.device | None, emit: Emit) -> Base:
    what = f"loading {subject.base.model}"
    emit(Progress(what=what, done=0, total=1))
    base = load_base(subject.base, template.tokenizer, device)
    emit(Progress(what=what, done=1, total=1))
    return base


def _questions(subject: Subject, options: Options, drawn: Drawn, template: Template, emit: Emit) -> Asked:
    if options.on is not None:
        source = source_of(options.on, options.name, options.split, subject.recipe)
        system = subject.recipe.data.system if subject.recipe is not None else None
        return questions_on(source, drawn.num_prompts, drawn.seed, template, system)
    if subject.recipe is None:
        raise UserError(
            f"{subject.name} is no run, so nothing says what to evaluate on: give --on FILE, a data set, or --tasks"
        )
    return own_questions(subject.recipe, drawn.num_prompts, template, emit)


@dataclass
class _Work:
    """One evaluation on the loaded base."""

    subject: Subject
    options: Options
    drawn: Drawn
    asked: Asked
    judge: Judge | None
    manager: Any
    emit: Emit
    begun: float = field(default_factory=time.time)

    def do(self, roles: Roles, base: Base, template: Template, marking: Marking) -> Evaluation:
        voices = [BASE, *self.subject.voices]
        usable = self._usable(marking)
        answering = marking.tells(usable) or bool(marking.rewards) or self.judge is not None
        if usable and not answering:
            self.emit(
                Note(
                    level="warning",
                    message="none of the questions has a gold answer, and nothing else says which answers are right: "
                    "only losses are measured (--verifier and --judge would tell more)",
                )
            )
            if not any(one.reference is not None for one in usable):
                raise UserError("and there are no reference answers either: there is nothing to measure")
        drawn = self.drawn
        sampling = Sampling(
            drawn.max_new_tokens, base.end_ids | template.end_ids, drawn.temperature, drawn.seed, top_p=drawn.top_p
        )
        found = Meter(roles, template, marking, sampling, drawn.samples, answering, self.emit).measure(
            voices, usable, drawn.seed
        )
        tasks, stopped = dict[str, Figures](), found.interrupted
        if self.options.tasks and not stopped:
            tasks, stopped = harness.measure(roles, base, template, voices, self._tasks(), self.emit)
        record = self._record(found, tasks, base, marking, stopped)
        return Evaluation(record, self.subject.folder / EVALS if self.subject.folder is not None else None, stopped)

    def _tasks(self) -> harness.Tasks:
        options = self.options
        return harness.Tasks(
            options.tasks, options.limit, options.confidence, self.drawn.seed, options.chat, self.manager
        )

    def _usable(self, marking: Marking) -> list[Any]:
        """The questions that answers can be judged of; the others are told."""
        reasons: dict[str, int] = {}
        usable = []
        for one in self.asked.questions:
            why = marking.unusable(one)
            if why is None:
                usable.append(one)
            else:
                reasons[why] = reasons.get(why, 0) + 1
        for why, count in reasons.items():
            self.emit(
                Note(level="warning", message=f"{count} of {len(self.asked.questions)} questions are left out: {why}")
            )
        if self.asked.questions and not usable:
            raise UserError(
                f"{self.asked.origin}: no answer to any of its questions could be judged: {next(iter(reasons))}"
            )
        return usable

    def _record(
        self, found: Measured, tasks: Mapping[str, Figures], base: Base, marking: Marking, stopped: bool
    ) -> dict[str, Any]:
        drawn, level, tuned = self.drawn, self.options.confidence, [voice for voice in found.voices if voice != BASE]
        ks, seed = drawn.ks if marking.tells(found.questions) else (), drawn.seed
        return {
            "v": VERSION,
            "kind": "eval",
            "time": self.begun,
            "seconds": round(time.time() - self.begun, 1),
            "subject": {
                "name": self.subject.name,
                "kind": self.subject.kind,
                "base": base.name,
                "revision": base.revision,
                "bits": base.bits,
                "voices": found.voices,
            },
            "on": {"origin": self.asked.origin, "prompts": len(found.done), "planned": len(found.questions)},
            "settings": {**drawn.to_dict(), "confidence": level},
            "right_by": marking.right_by if ks else "",
            "rewards": {each.name: each.weight for each in marking.rewards},
            "judge": str(self.judge.run) if self.judge else None,
            "device": device_name(base.device),
            "interrupted": stopped,
            "figures": {voice: _plain(figures_of(found, voice, ks, seed, level)) for voice in found.voices},
            "changes": {voice: _plain(changes_of(found, voice, ks, seed, level)) for voice in tuned},
            "wins": {voice: self._wins(found, voice, bool(ks)) for voice in tuned},
            "unjudged": lost(found),
            "tasks": {voice: _plain(several) for voice, several in tasks.items()},
        }

    def _wins(self, found: Measured, voice: str, told: bool) -> dict[str, Any]:
        level, made = self.options.confidence, dict[str, Any]()
        if told:
            made["verifier"] = wins_of(
                found, voice, lambda mark: None if mark.right is None else float(mark.right), level
            )
        if self.judge is not None:
            made["judge"] = wins_of(found, voice, lambda mark: mark.score, level)
        return {name: one for name, one in made.items() if one is not None}


def _plain(figures: Figures) -> dict[str, Any]:
    return {name: one.to_dict() for name, one in figures.items() if math.isfinite(one.value)}


def has_figures(record: Mapping[str, Any]) -> bool:
    """Whether anything was measured."""
    parts: Sequence[Any] = [*record["figures"].values(), *record["tasks"].values()]
    return any(parts)
