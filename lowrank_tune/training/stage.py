"""One stage of a run: the loop with its evaluations, checkpoints and resume, and what is left at its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from lowrank_tune.assembly import RunComponents
from lowrank_tune.assembly.reward_model import REWARD_ROLE
from lowrank_tune.checkpoint import (
    CorruptCheckpoint,
    RunFolder,
    Snapshot,
    flatten_optimizer,
    load,
    restore_optimizer,
    rotate,
    write_atomically,
)
from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.memory_rules import memory_settings
from lowrank_tune.data import TokenizedSplits
from lowrank_tune.data_report import report_prompts, report_rows
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.evaluation.grading import GradedAnswer
from lowrank_tune.evaluation.heldout import generate_answers, heldout_metrics
from lowrank_tune.evaluation.questions import EvalQuestion, render_questions, select_questions
from lowrank_tune.evaluation.validation import score_pairs, validate
from lowrank_tune.events import (
    CheckpointSaved,
    Emit,
    Evaluated,
    Event,
    LogMessage,
    RunEnded,
    RunStarted,
    SampleLogged,
    StepEnd,
)
from lowrank_tune.model.adapters import CONFIG, WEIGHTS
from lowrank_tune.model.base import combined_hash, hash_of
from lowrank_tune.model.optimizers import load_optimizer
from lowrank_tune.rewards.text.repetition import NGRAM, distinct_ngram_fraction
from lowrank_tune.training.reward_hacking import RewardHackingDetector, accuracy_stderr
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.training.trainer import Trainer, TrainerState, make_optimizer
from lowrank_tune.types import SamplingParams

# over a run, where the recipe does not say
DEFAULT_NUM_EVALUATIONS = 10
DEFAULT_NUM_SAVES = 10


@dataclass
class _BestCheckpoint:
    """What the end of a run wants to know of its beginning and middle; saved with each checkpoint."""

    best_step: int | None = None
    best_score: float | None = None  # higher is better
    best_metrics: dict[str, float] = field(default_factory=dict)
    heldout: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Stage:
    """One algorithm over the loaded base: `train`, then `finish`. The runner owns folder, sinks and signals around
    it."""

    def __init__(
        self,
        recipe: RecipeConfig,
        folder: RunFolder,
        built: RunComponents,
        emit: Emit,
        control: TrainerControl,
        checkpoint: tuple[int, Snapshot] | None,
        position: tuple[int, int] = (1, 1),
        name: str | None = None,
        previous_results: Mapping[str, Any] | None = None,
    ) -> None:
        """`position`: this is stage i of n of a chain, called `name` there; `previous_results` holds held-out figures
        and answers of those before."""
        self.recipe = recipe
        self.folder = folder
        self.built = built
        self.emit = emit
        self.position = position
        self.heldout_name = name or recipe.algorithm
        previous = previous_results or {}
        self.hacking_detector = RewardHackingDetector()
        self.best_checkpoint = _BestCheckpoint(
            heldout=dict(previous.get("heldout", {})), answers=dict(previous.get("answers", {}))
        )
        named_parameters = {role: built.roles.named_parameters(role) for role in built.trained}
        self.parameter_names = [name for parameters in named_parameters.values() for name in parameters]
        parameters = [
            parameter for role_parameters in named_parameters.values() for parameter in role_parameters.values()
        ]
        parameter_groups = [
            {"params": list(role_parameters.values()), "share": built.lr_multipliers.get(role, 1.0)}
            for role, role_parameters in named_parameters.items()
        ]
        optimizer = make_optimizer(
            parameter_groups if len(parameter_groups) > 1 else parameters,
            recipe.train,
            built.base.device,
        )
        self.trainer = Trainer(
            built.algorithm,
            parameters,
            optimizer,
            recipe.train,
            built.steps,
            recipe.seed,
            built.base.device,
            self._on_event,
            self._on_step_end,
            control,
            limits=built.roles.limits,
        )
        self.evaluate_every = recipe.evaluate.eval_steps or max(1, built.steps // DEFAULT_NUM_EVALUATIONS)
        self.save_every = recipe.train.save_steps or max(1, built.steps // DEFAULT_NUM_SAVES)
        self.is_generative = "policy" in built.trained  # a reward model only listens
        if self.is_generative:
            self.heldout = render_questions(built.heldout, built.template)
        else:
            self.heldout = []
        validation = built.validation
        shown = self.heldout or (
            select_questions(validation, built.template, recipe.evaluate.num_completions_to_print)
            if validation is not None
            else []
        )
        self.shown_questions: list[EvalQuestion] = (
            self._questions_with_room(shown)[: recipe.evaluate.num_completions_to_print] if self.is_generative else []
        )
        self.summary: dict[str, Any] = {}
        self.pair_metrics: dict[str, float] = {}
        self.base_hashes = built.base_hashes
        self.adapters = {
            name: combined_hash(_tensor_hashes(built.roles.adapter_tensors(name)))
            for name in recipe.adapters
            if name not in built.trained
        }
        self.is_resumed = checkpoint is not None
        self.step_at_start = self.last_handled_step = checkpoint[0] if checkpoint else 0
        self.last_saved_step: int | None = checkpoint[0] if checkpoint else None
        if checkpoint:
            self._restore(checkpoint[1])
        base = built.base
        folder.write_json(
            "base.json",
            {
                "model": base.name,
                "revision": base.revision,
                "bits": base.bits,
                "device": base.device.type,
                "rope_factors": base.rope.factors if base.rope is not None else None,
                "tensors": self.base_hashes,
                "adapters": self.adapters,
            },
        )
        if isinstance(built.data, TokenizedSplits):
            data_summary = report_rows(recipe, built.data, built.template, built.heldout)
        else:
            data_summary = report_prompts(recipe, built.data, built.template, built.heldout)
        folder.write_json("data.json", data_summary.to_dict())

    def train(self, set_training: Callable[[bool], None]) -> tuple[int, bool]:
        """Runs the loop; returns the step reached, and whether that is the last one."""
        self._emit_run_started()
        if not self.is_resumed:
            self._log_samples("reference", 0)
        if self.heldout and self.reference_name not in self.best_checkpoint.heldout:
            self._heldout_metrics(self.reference_name, "reference", 0)
        set_training(True)
        finished = self.trainer.run()
        set_training(False)
        return self.trainer.state.step, finished

    def _questions_with_room(self, questions: Sequence[EvalQuestion]) -> list[EvalQuestion]:
        """Those whose answers make no row that is longer than the base's rotary frequencies are for."""
        limit = self.built.base.max_row_length
        new_tokens = self.recipe.evaluate.max_new_tokens
        return [one for one in questions if limit is None or len(one.prompt_ids) + new_tokens <= limit]

    @property
    def reference_name(self) -> str:
        """What the policy starts from, by name: the base, or the frozen adapter right below it."""
        return next(
            (name for name in reversed(self.recipe.adapters) if name not in (*self.built.trained, REWARD_ROLE)), "base"
        )

    def finish(
        self,
        finished: bool,
        start_time: float,
        last: dict[str, float],
        warnings: list[str],
        make_final: Callable[[Stage], Snapshot],
        earlier_seconds: float = 0.0,
    ) -> None:
        """The best adapter answers the held-out prompts, what `make_final` takes of it becomes `final/`, and the
        summary is written. Its `seconds` are those of all sessions, `earlier_seconds` those of the sessions before."""
        step = self.trainer.state.step
        if finished:
            self._load_best()
            if self.heldout:
                self._heldout_metrics(self.heldout_name, "policy", step)
            if self.recipe.uses_pairs and self.built.validation is not None:
                self._score_pairs(step)
        end = combined_hash(self.built.base.hashes())
        frozen = {name: combined_hash(_tensor_hashes(self.built.roles.adapter_tensors(name))) for name in self.adapters}
        if end != combined_hash(self.base_hashes) or frozen != self.adapters:
            raise TrainingError(
                "the frozen base, or a frozen adapter, is not what it was at the start of the run: please report it"
            )
        status: Literal["done", "interrupted"] = "done" if finished else "interrupted"
        if self.best_checkpoint.best_step is not None:
            best = {"best": {"step": self.best_checkpoint.best_step, **self.best_checkpoint.best_metrics}}
        else:
            best = {}
        self.summary = {
            "version": 1,
            "status": status,
            "name": self.recipe.name,
            "algorithm": self.recipe.algorithm,
            "step": step,
            "steps": self.built.steps,
            "seconds": round(earlier_seconds + time.time() - start_time, 1),
            "last": last,
            **best,
            "heldout": {name: stats["accuracy"] for name, stats in self.best_checkpoint.heldout.items()},
            "heldout_details": self.best_checkpoint.heldout,
            "answers": self.best_checkpoint.answers,
            **({"heldout_pairs": self.pair_metrics} if self.pair_metrics else {}),
            **(
                {"hacking": {"step": self.hacking_detector.warned_at_step, "ended": self.hacking_detector.stopped_run}}
                if self.hacking_detector.warned_at_step is not None
                else {}
            ),
            "base_hash": {"start": combined_hash(self.base_hashes), "end": end},
            "adapter_hashes": self.adapters,
            "warnings": warnings,
        }
        if finished:
            write_atomically(self.folder.final, make_final(self))
        number, count = self.position
        self.emit(RunEnded(status=status, step=step, seconds=time.time() - start_time, stage=number, stages=count))
        self.folder.write_json("summary.json", self.summary)

    def _score_pairs(self, step: int) -> None:
        """What the trained adapter thinks of the held-out pairs: for the report's calibration, and for the summary."""
        built = self.built
        validation = self.built.validation
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
        self.pair_metrics = scores.metrics()
        self.emit(Evaluated(step=step, stats={f"pairs/{name}": value for name, value in self.pair_metrics.items()}))

    def _emit_run_started(self) -> None:
        built = self.built
        roles = self.built.roles
        self.emit(
            RunStarted(
                name=self.recipe.name,
                algorithm=self.recipe.algorithm,
                model=built.base.name,
                roles={role: [name.removeprefix("lt_") for name in stack] for role, stack in roles.stacks.items()},
                reference=built.reference,
                steps=built.steps,
                resumed_from=self.step_at_start,
                trainable=sum(p.numel() for p in self.trainer.parameters),
                device=_device_name(built.base.device),
                versions=_versions(),
                memory_total_gib=_memory_total_gib(built.base.device),
                stage=self.position[0],
                stages=self.position[1],
            )
        )
        if (warmup := self.recipe.train.warmup_steps) >= built.steps:
            self.emit(
                LogMessage(
                    level="warning",
                    message=f"train.warmup_steps: {warmup}, of {built.steps} steps in all: the learning rate never "
                    "reaches its peak; warm up for fewer, or train longer",
                )
            )

    def _on_step_end(self, state: TrainerState, is_last: bool) -> None:
        """What is due at this step, once; and what a person asked for, which never decides what the best step is: the
        final adapter must not hang on when somebody looked or interrupted."""
        step = state.step
        control = self.trainer.control
        is_new_step = step != self.last_handled_step
        is_best = False
        self.last_handled_step = step
        if is_new_step and (step % self.evaluate_every == 0 or is_last):
            is_best = self._evaluate(step, may_be_best=True)
            is_last = is_last or self.trainer.should_stop
        elif control.evaluate:
            self._evaluate(step, may_be_best=False)
        if (
            is_new_step and (step % self.save_every == 0 or is_last or is_best) or control.save
        ) and self.last_saved_step != step:
            self._save(step)
        control.evaluate = control.save = False

    def _evaluate(self, step: int, may_be_best: bool) -> bool:
        """Held-out rows, held-out questions where they decide, and shown samples; returns whether it counts and is the
        best so far."""
        built = self.built
        metric = self.recipe.metric_for_best_model
        validation = heldout = None
        if built.validation is not None:
            validation = validate(
                built.algorithm,
                built.roles,
                built.validation,
                built.validation_batch,
                built.micro_tokens,
                self.emit,
            )
        if metric == "accuracy":
            heldout = self._evaluate_heldout()
        deciding_metrics = heldout if metric == "accuracy" else validation
        if deciding_metrics is None:
            score = None
        elif metric == "accuracy":
            score = deciding_metrics["accuracy"]
        else:
            score = -deciding_metrics["loss"]
        best_checkpoint = self.best_checkpoint
        # Of steps with as many right answers the later one counts: a score saturates while what is sampled still
        # grows better.
        is_better = score is not None and (
            best_checkpoint.best_score is None
            or score > best_checkpoint.best_score
            or (metric == "accuracy" and score == best_checkpoint.best_score)
        )
        is_best = may_be_best and deciding_metrics is not None and is_better
        if is_best and deciding_metrics is not None:
            best_checkpoint.best_step = step
            best_checkpoint.best_score = score
            best_checkpoint.best_metrics = deciding_metrics
        stats = {f"eval_{name}": value for name, value in (validation or {}).items()}
        if heldout is not None:
            stats |= {f"heldout/policy/{name}": value for name, value in heldout.items()}
            stats["heldout_accuracy_stderr"] = accuracy_stderr(heldout["accuracy"], len(self.heldout))
        if stats:
            self.emit(Evaluated(step=step, stats=stats, best=is_best))
        if may_be_best and heldout is not None:
            self._check_reward_hacking(step, heldout["accuracy"])
        if built.validation is not None and not self.is_generative:
            self._log_pair_scores(step)
        self._log_samples("policy", step)
        return is_best

    def _evaluate_heldout(self) -> dict[str, float]:
        """The policy's answers to the held-out questions, one each, judged; and how much they repeat themselves. They
        are drawn as those of `_heldout_metrics`: a greedy answer can be right long before most sampled ones are."""
        sampling = self._heldout_sampling()
        answers = generate_answers(
            self.built.roles,
            "policy",
            self.built.template,
            self.heldout,
            1,
            sampling,
            self.emit,
        )
        repeated = [1 - distinct_ngram_fraction(sample.text, NGRAM) for samples in answers for sample in samples]
        return {**heldout_metrics(answers), "repetition": sum(repeated) / len(repeated)}

    def _on_event(self, event: Event) -> None:
        """What the loop tells goes on to all; the watch over the reward remembers each step."""
        if isinstance(event, StepEnd):
            self.hacking_detector.step(event.stats)
        self.emit(event)

    def _check_reward_hacking(self, step: int, accuracy: float) -> None:
        """Says it once where the reward rises and held-out answers get worse; and ends the run there, where the recipe
        wants that."""
        divergence = self.hacking_detector.update(
            step,
            accuracy,
            len(self.heldout),
            self.best_checkpoint.heldout.get(self.reference_name, {}).get("accuracy"),
        )
        if divergence is None:
            return
        if self.hacking_detector.warned_at_step is None:
            self.hacking_detector.warned_at_step = step
            self.emit(LogMessage(level="warning", message=f"step {step}: {divergence.message}"))
        if self.recipe.evaluate.on_reward_hacking == "stop" and step < self.built.steps:
            self.hacking_detector.stopped_run = self.trainer.should_stop = True
            self.emit(
                LogMessage(
                    message=f"the run ends after step {step} of {self.built.steps}, as evaluate.on_reward_hacking says"
                )
            )

    def _log_samples(self, role: str, step: int) -> None:
        if self.shown_questions:
            sampling = SamplingParams(self.recipe.evaluate.max_new_tokens, self.built.stop_ids, temperature=0.0)
            answers = generate_answers(
                self.built.roles,
                role,
                self.built.template,
                self.shown_questions,
                1,
                sampling,
                _ignore_event,
            )
            self._emit_samples([samples[0] for samples in answers], role, step)

    def _log_pair_scores(self, step: int) -> None:
        """Both answers of a few held-out pairs with what they score."""
        built = self.built
        rows = self.built.validation
        assert rows is not None
        units = list(range(min(self.recipe.evaluate.num_completions_to_print, rows.units)))
        if not units:
            return
        with built.roles.inference_mode():
            scores = built.algorithm.scores(built.validation_batch(units).to(built.base.device)).tolist()  # type: ignore[attr-defined]
        for index, score in enumerate(scores):
            row = rows[index]
            start = list(row.completion_mask).index(True)
            texts = [
                built.template.decode([int(token) for token in ids])
                for ids in (row.input_ids[:start], row.input_ids[start:])
            ]
            self.emit(
                SampleLogged(
                    step=step,
                    prompt=texts[0],
                    completion=texts[1],
                    finish_reason="stop",
                    role=("chosen", "rejected")[index % 2],
                    reward=score,
                )
            )

    def _heldout_metrics(self, name: str, role: str, step: int) -> None:
        """Answers to the held-out prompts by a role, kept under `name`."""
        config = self.recipe.evaluate
        sampling = self._heldout_sampling()
        answers = generate_answers(
            self.built.roles,
            role,
            self.built.template,
            self.heldout,
            config.num_samples,
            sampling,
            self.emit,
        )
        self.best_checkpoint.heldout[name] = heldout_metrics(answers)
        self.emit(
            Evaluated(
                step=step,
                stats={f"heldout/{name}/{key}": value for key, value in self.best_checkpoint.heldout[name].items()},
            )
        )
        self.best_checkpoint.answers[name] = [
            self._as_sample(samples[0]) for samples in answers[: config.num_completions_to_print]
        ]

    def _heldout_sampling(self) -> SamplingParams:
        """Greedy where each question has one answer."""
        config = self.recipe.evaluate
        temperature = config.temperature if config.num_samples > 1 else 0.0
        return SamplingParams(config.max_new_tokens, self.built.stop_ids, temperature, self.recipe.seed)

    def _emit_samples(self, answers: list[GradedAnswer], role: str, step: int) -> None:
        for answer in answers:
            sample = self._as_sample(answer)
            finish = "stop" if sample.pop("stopped") else "length"
            self.emit(SampleLogged(step=step, finish_reason=finish, role=role, **sample))

    def _as_sample(self, answer: GradedAnswer) -> dict[str, Any]:
        question = self.shown_questions[answer.prompt_index]
        return {
            "prompt": question.text,
            "completion": answer.text,
            "stopped": answer.stopped,
            "ground_truth": question.ground_truth,
        }

    def _save(self, step: int) -> None:
        start_time = time.perf_counter()
        roles = self.built.roles
        optimizer, document = flatten_optimizer(self.trainer.optimizer.state_dict(), self.parameter_names)
        snapshot = Snapshot(
            tensors={
                **{f"{name}/{WEIGHTS}": roles.adapter_tensors(name) for name in self.built.trained},
                "optimizer.safetensors": optimizer,
            },
            documents={
                **{f"{name}/{CONFIG}": roles.adapter_config(name) for name in self.built.trained},
                "optimizer.json": document,
                "state.json": {
                    "progress": self.trainer.state.to_dict(),
                    "memory": vars(self.best_checkpoint),
                    "algorithm": self.built.algorithm.state(),
                    "base": combined_hash(self.base_hashes),
                    "adapters": self.adapters,
                    "threads": torch.get_num_threads(),
                    "watch": vars(self.hacking_detector),
                    "limits": {"under": self._memory_settings(), **roles.limits.to_dict()},
                },
            },
        )
        path = write_atomically(self.folder.checkpoint(step), snapshot)
        self.last_saved_step = step
        rotate(self.folder.checkpoints, self.recipe.train.save_total_limit, self.best_checkpoint.best_step)
        self.emit(CheckpointSaved(step=step, path=str(path), seconds=time.perf_counter() - start_time))

    def _restore(self, snapshot: Snapshot) -> None:
        state = snapshot.documents["state.json"]
        for label, is_same in (
            ("base is", state["base"] == combined_hash(self.base_hashes)),
            ("frozen adapters are", state["adapters"] == self.adapters),
        ):
            if not is_same:
                raise UserError(
                    f"{self.folder.path}: the {label} not what this run was started with; give another folder with "
                    "--out"
                )
        for name in self.built.trained:
            self.built.roles.load_adapter_tensors(name, snapshot.tensors[f"{name}/{WEIGHTS}"], str(self.folder.path))
        optimizer = restore_optimizer(
            snapshot.tensors["optimizer.safetensors"],
            snapshot.documents["optimizer.json"],
            self.parameter_names,
        )
        load_optimizer(self.trainer.optimizer, optimizer)
        self.trainer.state = TrainerState(**state["progress"])
        self.best_checkpoint = _BestCheckpoint(**state["memory"])
        self.hacking_detector = RewardHackingDetector(**state.get("watch", {}))
        limits = dict(state.get("limits", {}))
        # with other settings, or on another card, what did not fit may
        if limits.pop("under", None) == self._memory_settings():
            self.built.roles.limits.restore(limits)
        self.trainer.should_stop = self.hacking_detector.stopped_run
        self.built.algorithm.restore(state["algorithm"])

    def _memory_settings(self) -> dict[str, Any]:
        device = self.built.base.device
        return {
            **memory_settings(self.recipe),
            "device": _device_name(device),
            "gib": round(_memory_total_gib(device), 1),
        }

    def _load_best(self) -> None:
        best = self.best_checkpoint.best_step
        if self.recipe.train.load_best_model_at_end and best is not None and best != self.trainer.state.step:
            try:
                path = self.folder.checkpoint(best)
                tensors = load(path, path.name).tensors
            except CorruptCheckpoint as error:
                self.emit(
                    LogMessage(
                        level="warning", message=f"{error}; final/ is the adapter of the last step instead of the best"
                    )
                )
                return
            for name in self.built.trained:
                self.built.roles.load_adapter_tensors(name, tensors[f"{name}/{WEIGHTS}"], str(self.folder.path))
            if self.recipe.metric_for_best_model == "accuracy":
                reason = "answered most held-out questions"
            else:
                reason = "had the lowest validation loss"
            self.emit(LogMessage(message=f"final/ is the adapter of step {best}, which {reason}"))


def _tensor_hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hash_of(tensor) for name, tensor in tensors.items()}


def _ignore_event(event: Event) -> None:
    pass


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, bf16"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}, fp32"


def _memory_total_gib(device: torch.device) -> float:
    """Of the card, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
