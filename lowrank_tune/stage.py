"""One stage of a run: the loop with its evaluations, checkpoints and resume, and what is left at its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from lowrank_tune import settings
from lowrank_tune.build import Built
from lowrank_tune.build.learned import ROLE
from lowrank_tune.checkpoint import (
    Broken,
    RunFolder,
    Snapshot,
    flatten_optimizer,
    load,
    restore_optimizer,
    rotate,
    write_atomically,
)
from lowrank_tune.control import Control
from lowrank_tune.data import Prepared
from lowrank_tune.errors import RunFailed, UserError
from lowrank_tune.evaluate import Answer, Question, answer, measure, questions_in, questions_of, score_pairs, validate
from lowrank_tune.events import Emit, Event, Note, RunEnded, RunStarted, Sampled, Saved, StepDone, Validated
from lowrank_tune.hacking import Watch, noise_of
from lowrank_tune.model.adapters import CONFIG, WEIGHTS
from lowrank_tune.model.base import hash_of, one_hash
from lowrank_tune.model.optimizers import load_optimizer
from lowrank_tune.preflight import survey, survey_asked
from lowrank_tune.recipe.memory import memory_settings
from lowrank_tune.rewards.repetition import NGRAM, distinct
from lowrank_tune.train import Loop, Progress, make_optimizer
from lowrank_tune.types import Sampling

EVALUATIONS, SAVES = 10, 10  # over a run, where the recipe does not say


@dataclass
class _Memory:
    """What the end of a run wants to know of its beginning and middle; saved with each checkpoint."""

    best_step: int | None = None
    best_score: float | None = None  # higher is better
    best: dict[str, float] = field(default_factory=dict)
    heldout: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Stage:
    """One algorithm over the loaded base: `train`, then `finish`. The runner owns folder, sinks and signals around
    it."""

    def __init__(
        self,
        recipe: settings.Recipe,
        folder: RunFolder,
        built: Built,
        emit: Emit,
        control: Control,
        found: tuple[int, Snapshot] | None,
        place: tuple[int, int] = (1, 1),
        name: str | None = None,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        """`place`: this is stage i of n of a chain, called `name` there; `earlier` holds held-out figures and answers
        of those before."""
        self.recipe, self.folder, self.built, self.emit = recipe, folder, built, emit
        self.place, self.measured_as = place, name or recipe.algorithm
        known = earlier or {}
        self.watch = Watch()
        self.memory = _Memory(heldout=dict(known.get("heldout", {})), answers=dict(known.get("answers", {})))
        named = {role: built.roles.named_parameters(role) for role in built.trained}
        self.names = [name for parameters in named.values() for name in parameters]
        parameters = [parameter for several in named.values() for parameter in several.values()]
        grouped = [
            {"params": list(several.values()), "share": built.rates.get(role, 1.0)} for role, several in named.items()
        ]
        optimizer = make_optimizer(grouped if len(grouped) > 1 else parameters, recipe.train, built.base.device)
        self.loop = Loop(
            built.algorithm,
            parameters,
            optimizer,
            recipe.train,
            built.steps,
            recipe.seed,
            built.base.device,
            self._hear,
            self._at_border,
            control,
            limits=built.roles.limits,
        )
        self.evaluate_every = recipe.evaluate.every or max(1, built.steps // EVALUATIONS)
        self.save_every = recipe.train.save_every or max(1, built.steps // SAVES)
        self.speaks = "policy" in built.trained  # a reward model only listens
        self.heldout = questions_of(built.heldout, built.template) if self.speaks else []
        validation = built.validation
        shown = self.heldout or (
            questions_in(validation, built.template, recipe.evaluate.shown) if validation is not None else []
        )
        self.shown: list[Question] = shown[: recipe.evaluate.shown] if self.speaks else []
        self.summary: dict[str, Any] = {}
        self.pairs: dict[str, float] = {}
        self.hashes = built.hashes
        self.adapters = {
            name: one_hash(_hashes(built.roles.adapter_tensors(name)))
            for name in recipe.adapters
            if name not in built.trained
        }
        self.resumes = found is not None
        self.step_at_start = self.border = found[0] if found else 0
        self.saved: int | None = found[0] if found else None
        if found:
            self._restore(found[1])
        base = built.base
        folder.write_json(
            "base.json",
            {
                "model": base.name,
                "revision": base.revision,
                "bits": base.bits,
                "device": base.device.type,
                "tensors": self.hashes,
                "adapters": self.adapters,
            },
        )
        seen = (
            survey(recipe, built.data, built.template, built.heldout)
            if isinstance(built.data, Prepared)
            else survey_asked(recipe, built.data, built.template, built.heldout)
        )
        folder.write_json("data.json", seen.to_dict())

    def train(self, training: Callable[[bool], None]) -> tuple[int, bool]:
        """Runs the loop; returns the step reached, and whether that is the last one."""
        self._tell_start()
        if not self.resumes:
            self._show("reference", 0)
        if self.heldout and self.below not in self.memory.heldout:
            self._measure(self.below, "reference", 0)
        training(True)
        finished = self.loop.run()
        training(False)
        return self.loop.progress.step, finished

    @property
    def below(self) -> str:
        """What the policy starts from, by name: the base, or the frozen adapter right below it."""
        return next(
            (name for name in reversed(self.recipe.adapters) if name not in (*self.built.trained, ROLE)), "base"
        )

    def finish(
        self,
        finished: bool,
        begun: float,
        last: dict[str, float],
        warnings: list[str],
        leave: Callable[[Stage], Snapshot],
    ) -> None:
        """The best adapter answers the held-out prompts, what is to `leave` of it becomes `final/`, and the summary is
        written."""
        step = self.loop.progress.step
        if finished:
            self._take_best()
            if self.heldout:
                self._measure(self.measured_as, "policy", step)
            if self.recipe.pairs and self.built.validation is not None:
                self._score_pairs(step)
        end = one_hash(self.built.base.hashes())
        frozen = {name: one_hash(_hashes(self.built.roles.adapter_tensors(name))) for name in self.adapters}
        if end != one_hash(self.hashes) or frozen != self.adapters:
            raise RunFailed(
                "the frozen base, or a frozen adapter, is not what it was at the start of the run: please report it"
            )
        status: Literal["done", "interrupted"] = "done" if finished else "interrupted"
        best = (
            {"best": {"step": self.memory.best_step, **self.memory.best}} if self.memory.best_step is not None else {}
        )
        self.summary = {
            "version": 1,
            "status": status,
            "name": self.recipe.name,
            "algorithm": self.recipe.algorithm,
            "step": step,
            "steps": self.built.steps,
            "seconds": round(time.time() - begun, 1),
            "last": last,
            **best,
            "heldout": {name: stats["exact"] for name, stats in self.memory.heldout.items()},
            "heldout_details": self.memory.heldout,
            "answers": self.memory.answers,
            **({"heldout_pairs": self.pairs} if self.pairs else {}),
            **(
                {"hacking": {"step": self.watch.spoke, "ended": self.watch.ended}}
                if self.watch.spoke is not None
                else {}
            ),
            "base_hash": {"start": one_hash(self.hashes), "end": end},
            "adapter_hashes": self.adapters,
            "warnings": warnings,
        }
        if finished:
            write_atomically(self.folder.final, leave(self))
        self.emit(RunEnded(status=status, step=step, seconds=time.time() - begun))
        self.folder.write_json("summary.json", self.summary)

    def _score_pairs(self, step: int) -> None:
        """What the trained adapter thinks of the held-out pairs: for the report's calibration, and for the summary."""
        built, validation = self.built, self.built.validation
        assert validation is not None
        scores = score_pairs(
            built.algorithm,  # type: ignore[arg-type]
            built.roles,
            validation,
            built.validation_batch,
            built.micro_tokens,
            self.emit,
        )
        self.folder.write_json("scores.json", scores.to_dict())
        self.pairs = scores.figures()
        self.emit(Validated(step=step, stats={f"pairs_{name}": value for name, value in self.pairs.items()}))

    def _tell_start(self) -> None:
        built, roles = self.built, self.built.roles
        self.emit(
            RunStarted(
                name=self.recipe.name,
                algorithm=self.recipe.algorithm,
                model=built.base.name,
                roles={role: [name.removeprefix("lt_") for name in stack] for role, stack in roles.stacks.items()},
                reference=built.reference,
                steps=built.steps,
                resumed_from=self.step_at_start,
                trainable=sum(p.numel() for p in self.loop.parameters),
                device=_device_name(built.base.device),
                versions=_versions(),
                memory_total_gib=_memory_total_gib(built.base.device),
                stage=self.place[0],
                stages=self.place[1],
            )
        )
        if (warmup := self.recipe.train.warmup_steps) >= built.steps:
            self.emit(
                Note(
                    level="warning",
                    message=f"train.warmup_steps: {warmup}, of {built.steps} steps in all: the learning rate never "
                    "reaches its peak; warm up for fewer, or train longer",
                )
            )

    def _at_border(self, progress: Progress, last: bool) -> None:
        """What is due at this step, once; and what a person asked for, which never decides what the best step is: the
        final adapter must not hang on when somebody looked or interrupted."""
        step, control = progress.step, self.loop.control
        due, better = step != self.border, False
        self.border = step
        if due and (step % self.evaluate_every == 0 or last):
            better = self._evaluate(step, counts=True)
            last = last or self.loop.enough
        elif control.evaluate:
            self._evaluate(step, counts=False)
        if (due and (step % self.save_every == 0 or last or better) or control.save) and self.saved != step:
            self._save(step)
        control.evaluate = control.save = False

    def _evaluate(self, step: int, counts: bool) -> bool:
        """Held-out rows, held-out questions where they decide, and shown samples; returns whether it counts and is the
        best so far."""
        built, by = self.built, self.recipe.best_by
        figures: dict[str, dict[str, float]] = {}
        if built.validation is not None:
            figures["validation"] = validate(
                built.algorithm, built.roles, built.validation, built.validation_batch, built.micro_tokens, self.emit
            )
        if by == "exact":
            figures["heldout_policy"] = self._ask()
        deciding = figures.get("heldout_policy" if by == "exact" else "validation")
        score = None if deciding is None else deciding["exact"] if by == "exact" else -deciding["loss"]
        memory = self.memory
        # Of steps with as many right answers the later one counts: a greedy score saturates while what is sampled still
        # grows better.
        ahead = score is not None and (
            memory.best_score is None or score > memory.best_score or (by == "exact" and score == memory.best_score)
        )
        better = counts and deciding is not None and ahead
        if better and deciding is not None:
            memory.best_step, memory.best_score, memory.best = step, score, deciding
        if figures:
            stats = {f"{part}_{name}": value for part, several in figures.items() for name, value in several.items()}
            if by == "exact":
                stats["gold_noise"] = noise_of(figures["heldout_policy"]["exact"], len(self.heldout))
            self.emit(Validated(step=step, stats=stats, best=better))
        if counts and by == "exact":
            self._watch_reward(step, figures["heldout_policy"]["exact"])
        if built.validation is not None and not self.speaks:
            self._show_scores(step)
        self._show("policy", step)
        return better

    def _ask(self) -> dict[str, float]:
        """The policy's answers to the held-out questions, one greedy answer each, judged; and how much they repeat
        themselves."""
        sampling = Sampling(self.recipe.evaluate.max_new_tokens, self.built.stop_ids, 0.0, self.recipe.seed)
        answers = answer(self.built.roles, "policy", self.built.template, self.heldout, 1, sampling, self.emit)
        repeated = [1 - distinct(one.text, NGRAM) for several in answers for one in several]
        return {**measure(answers), "repetition": sum(repeated) / len(repeated)}

    def _hear(self, event: Event) -> None:
        """What the loop tells goes on to all; the watch over the reward remembers each step."""
        if isinstance(event, StepDone):
            self.watch.step(event.stats)
        self.emit(event)

    def _watch_reward(self, step: int, exact: float) -> None:
        """Says it once where the reward rises and held-out answers get worse; and ends the run there, where the recipe
        wants that."""
        parting = self.watch.look(step, exact, len(self.heldout), self.memory.heldout.get(self.below, {}).get("exact"))
        if parting is None:
            return
        if self.watch.spoke is None:
            self.watch.spoke = step
            self.emit(Note(level="warning", message=f"step {step}: {parting.words}"))
        if self.recipe.evaluate.on_hacking == "stop" and step < self.built.steps:
            self.watch.ended = self.loop.enough = True
            self.emit(
                Note(message=f"the run ends after step {step} of {self.built.steps}, as evaluate.on_hacking says")
            )

    def _show(self, role: str, step: int) -> None:
        if self.shown:
            sampling = Sampling(self.recipe.evaluate.max_new_tokens, self.built.stop_ids, temperature=0.0)
            answers = answer(self.built.roles, role, self.built.template, self.shown, 1, sampling, _silent)
            self._tell_samples([several[0] for several in answers], role, step)

    def _show_scores(self, step: int) -> None:
        """Both answers of a few held-out pairs with what they score."""
        built, rows = self.built, self.built.validation
        assert rows is not None
        units = list(range(min(self.recipe.evaluate.shown, rows.units)))
        if not units:
            return
        with built.roles.quiet():
            scores = built.algorithm.scores(built.validation_batch(units).to(built.base.device)).tolist()  # type: ignore[attr-defined]
        for place, score in enumerate(scores):
            row = rows[place]
            start = list(row.says).index(True)
            texts = [built.template.decode([int(token) for token in ids]) for ids in (row.ids[:start], row.ids[start:])]
            self.emit(
                Sampled(
                    step=step,
                    prompt=texts[0],
                    completion=texts[1],
                    finish="stop",
                    role=("chosen", "rejected")[place % 2],
                    reward=score,
                )
            )

    def _measure(self, name: str, role: str, step: int) -> None:
        """Answers to the held-out prompts by a role, kept under `name`."""
        wanted = self.recipe.evaluate
        sampling = Sampling(
            wanted.max_new_tokens,
            self.built.stop_ids,
            wanted.temperature if wanted.samples > 1 else 0.0,
            self.recipe.seed,
        )
        answers = answer(self.built.roles, role, self.built.template, self.heldout, wanted.samples, sampling, self.emit)
        self.memory.heldout[name] = measure(answers)
        self.emit(
            Validated(
                step=step, stats={f"heldout_{name}_{key}": value for key, value in self.memory.heldout[name].items()}
            )
        )
        self.memory.answers[name] = [self._as_sample(several[0]) for several in answers[: wanted.shown]]

    def _tell_samples(self, answers: list[Answer], role: str, step: int) -> None:
        for one in answers:
            sample = self._as_sample(one)
            finish = "stop" if sample.pop("stopped") else "length"
            self.emit(Sampled(step=step, finish=finish, role=role, **sample))

    def _as_sample(self, one: Answer) -> dict[str, Any]:
        question = self.shown[one.prompt]
        return {"prompt": question.text, "completion": one.text, "stopped": one.stopped, "gold": question.gold}

    def _save(self, step: int) -> None:
        begun, roles = time.perf_counter(), self.built.roles
        optimizer, document = flatten_optimizer(self.loop.optimizer.state_dict(), self.names)
        snapshot = Snapshot(
            tensors={
                **{f"{name}/{WEIGHTS}": roles.adapter_tensors(name) for name in self.built.trained},
                "optimizer.safetensors": optimizer,
            },
            documents={
                **{f"{name}/{CONFIG}": roles.adapter_config(name) for name in self.built.trained},
                "optimizer.json": document,
                "state.json": {
                    "progress": self.loop.progress.to_dict(),
                    "memory": vars(self.memory),
                    "algorithm": self.built.algorithm.state(),
                    "base": one_hash(self.hashes),
                    "adapters": self.adapters,
                    "threads": torch.get_num_threads(),
                    "watch": vars(self.watch),
                    "limits": {"under": self._memory_settings(), **roles.limits.to_dict()},
                },
            },
        )
        path = write_atomically(self.folder.checkpoint(step), snapshot)
        self.saved = step
        rotate(self.folder.checkpoints, self.recipe.train.keep, self.memory.best_step)
        self.emit(Saved(step=step, path=str(path), seconds=time.perf_counter() - begun))

    def _restore(self, snapshot: Snapshot) -> None:
        state = snapshot.documents["state.json"]
        for what, same in (
            ("base is", state["base"] == one_hash(self.hashes)),
            ("frozen adapters are", state["adapters"] == self.adapters),
        ):
            if not same:
                raise UserError(
                    f"{self.folder.path}: the {what} not what this run was started with; give another folder with --out"
                )
        for name in self.built.trained:
            self.built.roles.load_adapter_tensors(name, snapshot.tensors[f"{name}/{WEIGHTS}"], str(self.folder.path))
        optimizer = restore_optimizer(
            snapshot.tensors["optimizer.safetensors"], snapshot.documents["optimizer.json"], self.names
        )
        load_optimizer(self.loop.optimizer, optimizer)
        self.loop.progress = Progress(**state["progress"])
        self.memory = _Memory(**state["memory"])
        self.watch = Watch(**state.get("watch", {}))
        limits = dict(state.get("limits", {}))
        # with other settings, or on another card, what did not fit may
        if limits.pop("under", None) == self._memory_settings():
            self.built.roles.limits.restore(limits)
        self.loop.enough = self.watch.ended
        self.built.algorithm.restore(state["algorithm"])

    def _memory_settings(self) -> dict[str, Any]:
        device = self.built.base.device
        return {
            **memory_settings(self.recipe),
            "device": _device_name(device),
            "gib": round(_memory_total_gib(device), 1),
        }

    def _take_best(self) -> None:
        best = self.memory.best_step
        if self.recipe.train.final == "best" and best is not None and best != self.loop.progress.step:
            try:
                tensors = load(self.folder.checkpoint(best)).tensors
            except Broken as error:
                self.emit(
                    Note(
                        level="warning", message=f"{error}; final/ is the adapter of the last step instead of the best"
                    )
                )
                return
            for name in self.built.trained:
                self.built.roles.load_adapter_tensors(name, tensors[f"{name}/{WEIGHTS}"], str(self.folder.path))
            why = (
                "answered most held-out questions"
                if self.recipe.best_by == "exact"
                else "had the lowest validation loss"
            )
            self.emit(Note(message=f"final/ is the adapter of step {best}, which {why}"))


def _hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hash_of(tensor) for name, tensor in tensors.items()}


def _silent(event: Event) -> None:
    pass


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, bf16"
    return f"CPU, {torch.get_num_threads()} threads, fp32"


def _memory_total_gib(device: torch.device) -> float:
    """Of the card, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
