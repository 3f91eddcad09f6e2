"""One stage of a run: the training loop with its evaluations and checkpoints, and the final adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lowrank_tune.assembly import RunComponents
from lowrank_tune.assembly.model import packs_as_tokens
from lowrank_tune.assembly.reward_model import REWARD_ROLE
from lowrank_tune.checkpoint import RunFolder, Snapshot, write_atomically
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import TokenizedSplits
from lowrank_tune.data_report import report_prompts, report_rows
from lowrank_tune.errors import TrainingError
from lowrank_tune.evaluation.pair_losses import ValidationResult
from lowrank_tune.events import Emit, Evaluated, Event, LogMessage, RunEnded, RunStarted, StepEnd, warning
from lowrank_tune.model.base import combined_hash
from lowrank_tune.run_summary import SUMMARY
from lowrank_tune.training.best_step import Measured, choose_final, update_best
from lowrank_tune.training.checkpointer import BestCheckpoint, Checkpointer, EvaluationState
from lowrank_tune.training.evaluator import StageEvaluator
from lowrank_tune.training.loss_scaling import LossScaler
from lowrank_tune.training.machine import device_name, library_versions, memory_total_gib
from lowrank_tune.training.reward_hacking import accuracy_stderr
from lowrank_tune.training.run_totals import RunTotals, Session
from lowrank_tune.training.signals import TrainerControl
from lowrank_tune.training.speed import SpeedComparison
from lowrank_tune.training.trainer import Trainer, TrainerState, make_optimizer

# over a run, if the recipe sets no interval
DEFAULT_NUM_EVALUATIONS = 10
DEFAULT_NUM_SAVES = 10


@dataclass(frozen=True)
class StagePosition:
    """Position of a stage in a chain: stage `number` of `count`, called `name` there.

    `previous_results` has the held-out metrics and answers of earlier stages that this stage may reuse.
    `shares_session`: whether an earlier stage ran in this session; None outside of a chain.
    """

    number: int = 1
    count: int = 1
    name: str | None = None
    previous_results: Mapping[str, Any] = field(default_factory=dict)
    shares_session: bool | None = None

    def ended(
        self,
        status: Literal["done", "interrupted", "failed"],
        step: int,
        session: Session,
        totals: RunTotals,
        message: str = "",
    ) -> RunEnded:
        """Returns the event of the end of a session of this stage."""
        return RunEnded(
            status=status,
            step=step,
            seconds=session.seconds,
            message=message,
            stage=self.number,
            stages=self.count,
            total_seconds=totals.seconds,
            sessions=totals.sessions,
            total_tokens=totals.tokens,
            total_step_seconds=totals.step_seconds,
            shares_first_session=totals.shares_first_session,
        )


class Stage:
    """One algorithm over the loaded base: `train`, then `finish`. The runner opens folder, sinks and signals."""

    def __init__(
        self,
        recipe: RecipeConfig,
        folder: RunFolder,
        built: RunComponents,
        emit: Emit,
        control: TrainerControl,
        checkpoint: tuple[int, Snapshot] | None,
        position: StagePosition,
        speed: SpeedComparison | None,
        session: Session,
    ) -> None:
        self.recipe = recipe
        self.speed = speed
        self.session = session
        self.folder = folder
        self.built = built
        self.emit = emit
        self.position = position
        self.heldout_name = self.position.name or recipe.algorithm
        self.evaluate_every = recipe.evaluate.eval_steps or max(1, built.steps // DEFAULT_NUM_EVALUATIONS)
        self.save_every = recipe.train.save_steps or max(1, built.steps // DEFAULT_NUM_SAVES)
        self.trainer, parameter_names = self._make_trainer(control)
        self.evaluator = StageEvaluator(recipe, built, emit)
        self.checkpointer = Checkpointer(
            recipe,
            folder,
            built,
            self.trainer,
            parameter_names,
            emit,
        )
        self.state = EvaluationState(_reused_results(self.position.previous_results))
        self.is_resumed = checkpoint is not None
        if checkpoint is not None:
            self.state = self.checkpointer.restore(*checkpoint)
        self.step_at_start = self.trainer.state.step
        self.last_handled_step = self.step_at_start
        self.pair_metrics: dict[str, float] = {}
        self.summary: dict[str, Any] = {}
        self._write_facts()

    def _make_trainer(self, control: TrainerControl) -> tuple[Trainer, list[str]]:
        """Returns the trainer and the names of its parameters, one parameter group for each trained role."""
        built = self.built
        names: list[str] = []
        parameters: list[nn.Parameter] = []
        groups: list[dict[str, Any]] = []
        for role in built.trained:
            named = built.roles.named_parameters(role)
            names += named.keys()
            parameters += named.values()
            groups.append({"params": list(named.values()), "share": built.lr_multipliers.get(role, 1.0)})
        optimizer = make_optimizer(
            groups if len(groups) > 1 else parameters,
            self.recipe.train,
            built.base.device,
        )
        train = self.recipe.train
        if isinstance(built.data, TokenizedSplits) and built.data.report.packing is not None:
            train = packs_as_tokens(train, self.recipe.data.max_length)
        trainer = Trainer(
            built.algorithm,
            parameters,
            optimizer,
            train,
            built.steps,
            self.recipe.seed,
            built.base.device,
            self._on_event,
            self._on_step_end,
            control,
            limits=built.roles.limits,
            loss_scaler=LossScaler(built.base.device.type, enabled=built.base.dtype == torch.float16),
            router_loss=built.roles.router_loss,
        )
        return trainer, names

    def _write_facts(self) -> None:
        """Writes `base.json`, the facts of the frozen weights, and `data.json`, the report on the data."""
        built = self.built
        base = built.base
        facts = {
            "model": base.name,
            "revision": base.revision,
            "bits": base.bits,
            "device": base.device.type,
            "rope_factors": base.rope.factors if base.rope is not None else None,
            "tensors": built.base_hashes,
            "adapters": self.checkpointer.frozen_hashes,
        }
        self.folder.write_json("base.json", facts)
        if isinstance(built.data, TokenizedSplits):
            report = report_rows(
                self.recipe,
                built.data,
                built.template,
                built.heldout,
            )
        else:
            report = report_prompts(
                self.recipe,
                built.data,
                built.template,
                built.heldout,
            )
        self.folder.write_json("data.json", report.to_dict())

    @property
    def frozen_adapters(self) -> dict[str, str]:
        """Hashes of the frozen adapters, by name."""
        return self.checkpointer.frozen_hashes

    @property
    def reference_name(self) -> str:
        """Name of what the policy starts from: the frozen adapter directly below it, or the base."""
        for name in reversed(self.recipe.adapters):
            if name != REWARD_ROLE and name not in self.built.trained:
                return name
        return "base"

    def train(self, set_training: Callable[[bool], None]) -> tuple[int, bool]:
        """Runs the loop. Returns the step reached, and whether it is the last one."""
        self._emit_run_started()
        if not self.is_resumed:
            self.evaluator.samples.log_answers("reference", 0)
        if self.evaluator.questions and self.reference_name not in self.state.best.heldout:
            self._measure_heldout(self.reference_name, "reference", 0)
        set_training(True)
        finished = self.trainer.run()
        set_training(False)
        return self.trainer.state.step, finished

    def finish(
        self,
        finished: bool,
        steps: RunTotals,
        last: dict[str, float],
        warnings: list[str],
        make_final: Callable[[Stage], Snapshot],
    ) -> None:
        """Measures the final adapter, writes `final/` with what `make_final` returns, and writes the summary.

        `steps` has the tokens and the time of the steps of all sessions. Raises TrainingError if the base or a frozen
        adapter changed during the run.
        """
        step = self.trainer.state.step
        if finished:
            self._measure_final(step)
        end_hash = self._check_frozen_weights()
        status: Literal["done", "interrupted"] = "done" if finished else "interrupted"
        self.summary = {
            "version": 1,
            "status": status,
            "name": self.recipe.name,
            "algorithm": self.recipe.algorithm,
            "step": step,
            "steps": self.built.steps,
            "last": last,
            **self._results(),
            "base_hash": {"start": self.checkpointer.base_hash, "end": end_hash},
            "adapter_hashes": self.frozen_adapters,
            "warnings": warnings,
        }
        if finished:
            write_atomically(self.folder.final, make_final(self))
        totals = self.session.totals(steps)
        self.emit(self.position.ended(status, step, self.session, totals))
        self.summary |= totals.to_dict()
        self.folder.write_json(SUMMARY, self.summary)

    def _results(self) -> dict[str, Any]:
        """Returns what the evaluations found, and the compared speeds, for the summary."""
        best = self.state.best
        hacking = self.state.hacking
        results: dict[str, Any] = {}
        if best.best_step is not None:
            results["best"] = {"step": best.best_step, **best.best_metrics}
        results["heldout"] = {name: metrics["accuracy"] for name, metrics in best.heldout.items()}
        results["heldout_details"] = best.heldout
        results["answers"] = best.answers
        if self.speed is not None and self.speed.to_dict():
            results["speed"] = self.speed.to_dict()
        if self.pair_metrics:
            results["heldout_pairs"] = self.pair_metrics
        if hacking.warned_at_step is not None:
            results["hacking"] = {"step": hacking.warned_at_step, "ended": hacking.stopped_run}
        return results

    def _measure_final(self, step: int) -> None:
        """Loads the adapter of the best step and measures it on held-out questions and pairs."""
        if self.recipe.train.load_best_model_at_end:
            self._load_best(step)
        if self.evaluator.questions:
            self._measure_heldout(self.heldout_name, "policy", step)
        if self.recipe.uses_pairs and self.built.validation is not None:
            scores = self.evaluator.pair_scores()
            self.folder.write_json("scores.json", scores.to_dict())
            self.pair_metrics = scores.metrics()
            stats = {f"pairs/{name}": value for name, value in self.pair_metrics.items()}
            self.emit(Evaluated(step=step, stats=stats))

    def _load_best(self, step: int) -> None:
        """Loads the adapter of the best step, by pairs only if it is better than the last one by more than noise."""
        best = self.state.best
        unit = "answers" if self.recipe.uses_labels else "pairs"
        message = choose_final(
            best,
            step,
            self.recipe.metric_for_best_model,
            unit,
        )
        if best.best_step is not None and best.best_step != step:
            self.checkpointer.load_best(best.best_step, message)
        elif message:
            self.emit(LogMessage(message=message))

    def _check_frozen_weights(self) -> str:
        """Returns the hash of the base. Raises TrainingError if it, or a frozen adapter, changed during the run."""
        end_hash = combined_hash(self.built.base.hashes())
        if end_hash != self.checkpointer.base_hash or self.checkpointer.hash_frozen_adapters() != self.frozen_adapters:
            raise TrainingError(
                "the frozen base, or a frozen adapter, is not what it was at the start of the run: please report it"
            )
        return end_hash

    def _measure_heldout(
        self,
        name: str,
        role: str,
        step: int,
    ) -> None:
        """Stores metrics and answers of a role to the held-out questions under `name`."""
        metrics, answers = self.evaluator.measure_heldout(name, role, step)
        self.state.best.heldout[name] = metrics
        self.state.best.answers[name] = answers

    def _emit_run_started(self) -> None:
        built = self.built
        stacks = built.roles.stacks.items()
        event = RunStarted(
            name=self.recipe.name,
            algorithm=self.recipe.algorithm,
            model=built.base.name,
            roles={role: [name.removeprefix("lt_") for name in stack] for role, stack in stacks},
            reference=built.reference,
            steps=built.steps,
            resumed_from=self.step_at_start,
            trainable=sum(parameter.numel() for parameter in self.trainer.parameters),
            device=device_name(built.base.device, built.base.dtype),
            versions=library_versions(),
            memory_total_gib=memory_total_gib(built.base.device),
            stage=self.position.number,
            stages=self.position.count,
            earlier_sessions=self.session.earlier.sessions,
            earlier_seconds=self.session.earlier.seconds,
            loading_seconds=self.session.seconds,
            shares_first_session=self.session.shares_first_session,
        )
        self.emit(event)
        if self.checkpointer.schedule_message:
            self.emit(warning(self.checkpointer.schedule_message))
        warmup_steps = self.recipe.train.warmup_steps
        if warmup_steps >= built.steps:
            self.emit(
                warning(
                    f"train.warmup_steps: {warmup_steps}, of {built.steps} steps in all: the learning rate never "
                    "reaches its peak; warm up for fewer steps, or train longer"
                )
            )

    def _on_event(self, event: Event) -> None:
        """Emits an event of the loop, between the reward hacking detector and the comparison of speeds."""
        if isinstance(event, StepEnd):
            self.state.hacking.step(event.stats)
        self.emit(event)
        if isinstance(event, StepEnd) and self.speed is not None:
            self.speed.add(event)

    def _on_step_end(self, state: TrainerState, is_last: bool) -> None:
        """Evaluates and saves what is due after a step, once, and what the user requested.

        A requested evaluation never updates the best step: the final adapter must not depend on when somebody looked or
        interrupted.
        """
        step = state.step
        control = self.trainer.control
        is_new_step = step != self.last_handled_step
        self.last_handled_step = step
        is_best = False
        if is_new_step and (step % self.evaluate_every == 0 or is_last):
            is_best = self._evaluate(step, may_be_best=True)
            is_last = is_last or self.trainer.should_stop
        elif control.evaluate:
            self._evaluate(step, may_be_best=False)
        save_is_due = is_new_step and (step % self.save_every == 0 or is_last or is_best)
        if (save_is_due or control.save) and self.checkpointer.last_saved_step != step:
            self.checkpointer.save(step, self.state)
        control.evaluate = False
        control.save = False

    def _evaluate(self, step: int, may_be_best: bool) -> bool:
        """Measures validation rows, and held-out questions if they select the best step; logs samples.

        Returns whether the step is the best so far.
        """
        validation = self.evaluator.validate_rows()
        heldout = None
        if self.recipe.metric_for_best_model == "accuracy":
            heldout = self.evaluator.policy_metrics()
        is_best = may_be_best and self._update_best(step, validation, heldout)
        stats: dict[str, float] = {}
        if validation is not None:
            stats |= {f"eval_{name}": value for name, value in validation.metrics.items()}
        if heldout is not None:
            stats |= {f"heldout/policy/{name}": value for name, value in heldout.items()}
            stats["heldout_accuracy_stderr"] = accuracy_stderr(heldout["accuracy"], len(self.evaluator.questions))
        if stats:
            self.emit(
                Evaluated(
                    step=step,
                    stats=stats,
                    best=is_best,
                )
            )
        if may_be_best and heldout is not None:
            self._check_reward_hacking(step, heldout["accuracy"])
        self.evaluator.log_samples(step)
        return is_best

    def _update_best(
        self,
        step: int,
        validation: ValidationResult | None,
        heldout: dict[str, float] | None,
    ) -> bool:
        """Stores the step if it is the best so far, by held-out accuracy or else by validation loss."""
        if heldout is not None:
            measured = Measured.by_accuracy(step, heldout)
        elif validation is not None:
            measured = Measured.by_loss(step, validation)
        else:
            return False
        return update_best(self.state.best, measured)

    def _check_reward_hacking(self, step: int, accuracy: float) -> None:
        """Warns once if the reward rises while held-out accuracy falls; stops the run for `on_reward_hacking: stop`."""
        detector = self.state.hacking
        reference_metrics = self.state.best.heldout.get(self.reference_name, {})
        num_questions = len(self.evaluator.questions)
        divergence = detector.update(
            step,
            accuracy,
            num_questions,
            reference_metrics.get("accuracy"),
        )
        if divergence is None:
            return
        if detector.warned_at_step is None:
            detector.warned_at_step = step
            self.emit(warning(f"step {step}: {divergence.message}"))
        if self.recipe.evaluate.on_reward_hacking == "stop" and step < self.built.steps:
            detector.stopped_run = True
            self.trainer.should_stop = True
            message = (
                f"the run ends after step {step} of {self.built.steps}, because evaluate.on_reward_hacking is stop"
            )
            self.emit(LogMessage(message=message))


def _reused_results(previous: Mapping[str, Any]) -> BestCheckpoint:
    return BestCheckpoint(
        heldout=dict(previous.get("heldout", {})),
        answers=dict(previous.get("answers", {})),
    )
