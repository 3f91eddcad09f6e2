"""`lowrank-tune eval`: base and tuned variants over the same weights on held-out questions and tasks, and the record of
the result."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.templates.template_kwargs import TemplateKwargs
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation import lm_eval
from lowrank_tune.evaluation.evaluator import EvalResult, Evaluator
from lowrank_tune.evaluation.grading import Grader
from lowrank_tune.evaluation.metrics import (
    REWARD_MODEL_SCORE,
    RIGHT,
    MetricOptions,
    Metrics,
    deltas_vs_base,
    missing_scores,
    variant_metrics,
    win_rates,
)
from lowrank_tune.evaluation.options import EvalSamplingOptions, Options, resolve_options
from lowrank_tune.evaluation.questions import (
    DEFAULT_MAX_LENGTH,
    EvalQuestion,
    EvalQuestions,
    eval_source,
    load_eval_questions,
    recipe_heldout_questions,
)
from lowrank_tune.evaluation.results import EVALS, VERSION
from lowrank_tune.evaluation.target import (
    BASE,
    EvalRewardModel,
    EvalTarget,
    check_bases,
    check_reward_model,
    resolve_reward_model,
    resolve_target,
    roles_for,
)
from lowrank_tune.events import Emit, LogMessage, ignore_event, loading_progress, warning
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.base import (
    Base,
    load_base,
    load_config,
    load_tokenizer,
)
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, fixed_rope, select_factors


def _chat_template(target: EvalTarget, options: Options) -> ChatTemplate:
    """Returns the template as the run's recipe sets it, with the variables of the options in place of its own."""
    date = None
    kwargs: TemplateKwargs = {}
    if target.recipe is not None:
        date = target.recipe.data.template_date
        kwargs = target.recipe.data.chat_template_kwargs
    kwargs = {**kwargs, **options.chat_template_kwargs}
    return ChatTemplate.from_tokenizer(
        load_tokenizer(target.base),
        date,
        kwargs=kwargs,
    )


@dataclass
class Evaluation:
    """Result of an evaluation: `record` is the line of `evals.jsonl`, `path` that file (None without a run)."""

    record: dict[str, Any]
    path: Path | None
    interrupted: bool = False


def evaluate(
    given: str,
    options: Options,
    emit: Emit = ignore_event,
    device: torch.device | None = None,
) -> Evaluation:
    """Evaluates a run, a chain, an adapter or a model. After Ctrl-C the finished questions are the result.

    Raises UserError; all checks that need no loaded model come first.
    """
    options.check()
    task_manager: Any = None
    if options.tasks:
        task_manager = lm_eval.make_task_manager(options.tasks, options.tasks_path)
    target = resolve_target(given, options.bits, emit)
    sampling_options = resolve_options(options, target.recipe)
    reward_model = _reward_model(options, target)
    template = _chat_template(target, options)
    questions = _questions(
        target,
        options,
        sampling_options,
        template,
        emit,
    )
    recipe = target.recipe if options.has_questions else None
    verifier = options.verifier if options.has_questions else None
    with Grader(recipe, verifier, reward_model is not None, template) as grader:
        factors, questions = _select_rope(
            target,
            questions,
            sampling_options.max_new_tokens,
            emit,
            reward_model,
        )
        base = _load(
            target,
            template,
            device,
            emit,
            factors,
        )
        check_bases(target, reward_model, base, emit)
        roles = roles_for(target, reward_model, base)
        grader.set_base_model(roles)
        run = _EvalRun(
            target,
            options,
            sampling_options,
            questions,
            reward_model,
            template,
            base,
            roles,
            grader,
            emit,
        )
        return run.run(task_manager)


def _reward_model(options: Options, target: EvalTarget) -> EvalRewardModel | None:
    """Returns the reward model of --reward-model, None without it. Raises UserError."""
    if options.reward_model is None:
        return None
    reward_model = resolve_reward_model(options.reward_model)
    check_reward_model(target, reward_model)
    return reward_model


def _questions(
    target: EvalTarget,
    options: Options,
    sampling_options: EvalSamplingOptions,
    template: ChatTemplate,
    emit: Emit,
) -> EvalQuestions:
    """Returns the questions of --dataset, else those of the run, or none for tasks alone. Raises UserError."""
    if not options.has_questions:
        return EvalQuestions([], "")
    num_prompts = sampling_options.num_prompts
    recipe = target.recipe
    if options.dataset is not None:
        source = eval_source(
            options.dataset,
            options.dataset_config,
            options.split,
            recipe,
        )
        data = None if recipe is None else recipe.data
        return load_eval_questions(
            source,
            num_prompts,
            sampling_options.seed,
            template,
            None if data is None else data.system_prompt,
            DEFAULT_MAX_LENGTH if data is None else data.max_length,
        )
    if recipe is None:
        raise UserError(
            f"{target.name} is not a run and has no held-out questions: give --dataset FILE, a hub data set, or --tasks"
        )
    return recipe_heldout_questions(
        recipe,
        num_prompts,
        template,
        emit,
    )


def _select_rope(
    target: EvalTarget,
    eval_questions: EvalQuestions,
    max_new_tokens: int,
    emit: Emit,
    reward_model: EvalRewardModel | None = None,
) -> tuple[RopeFactors, EvalQuestions]:
    """Returns the rotary frequencies of the training, else those of the reward model, else those for the longest row;
    and the questions whose rows are short enough for them. Raises UserError if no question is left."""
    config = load_config(target.base)
    questions = eval_questions.questions
    lengths = [question.row_length(max_new_tokens) for question in questions]
    longest = max(lengths, default=0)
    trained = target.rope_factors
    if trained is None and reward_model is not None:
        trained = reward_model.rope_factors
    factors = trained or select_factors(config, longest)
    rope = fixed_rope(config, factors)
    if rope is None:
        return factors, eval_questions
    emit(LogMessage(message=rope.describe()))
    limit = rope.max_row_length or longest
    usable = [question for question, length in zip(questions, lengths, strict=True) if length <= limit]
    if questions and not usable:
        rope.check_row_length(min(lengths))
    if len(usable) < len(questions):
        emit(
            warning(
                f"{len(questions) - len(usable)} of {len(questions)} questions are left out: with an answer of up to "
                f"{max_new_tokens:,} tokens they have more than {limit:,}, the limit of the base's {rope.name}"
            )
        )
    return factors, EvalQuestions(usable, eval_questions.origin)


def _load(
    target: EvalTarget,
    template: ChatTemplate,
    device: torch.device | None,
    emit: Emit,
    rope_factors: RopeFactors,
) -> Base:
    with loading_progress(target.base.model, emit):
        return load_base(
            target.base,
            template.tokenizer,
            device,
            rope_factors=rope_factors,
        )


@dataclass
class _EvalRun:
    """One evaluation with a loaded base."""

    target: EvalTarget
    options: Options
    sampling_options: EvalSamplingOptions
    eval_questions: EvalQuestions
    reward_model: EvalRewardModel | None
    template: ChatTemplate
    base: Base
    roles: Roles
    grader: Grader
    emit: Emit
    started: float = field(default_factory=time.time)

    def run(self, task_manager: Any) -> Evaluation:
        """Evaluates the questions, then the tasks. Raises UserError if there is nothing to evaluate."""
        variants = [BASE, *self.target.variants]
        questions = self._gradable_questions()
        samples = self.sampling_options.num_samples
        if questions and not self._answers_have_grades(questions):
            self._check_losses_alone(questions)
            samples = 0
        evaluator = Evaluator(
            self.roles,
            self.template,
            self.grader,
            self._sampling(),
            samples,
            self.emit,
        )
        result = evaluator.measure(variants, questions, self.sampling_options.seed)
        tasks: dict[str, Metrics] = {}
        if self.options.tasks and not result.interrupted:
            settings = lm_eval.Tasks(self.options, self.sampling_options.seed, task_manager)
            tasks, result.interrupted = lm_eval.run_tasks(
                self.roles,
                self.base,
                self.template,
                variants,
                settings,
                self.emit,
            )
        path = None
        if self.target.folder is not None:
            path = self.target.folder / EVALS
        return Evaluation(self._record(result, tasks), path, result.interrupted)

    def _gradable_questions(self) -> list[EvalQuestion]:
        """Returns the questions whose answers can be graded; a warning counts the others. Raises UserError if there are
        none."""
        questions = self.eval_questions.questions
        usable = []
        reasons: Counter[str] = Counter()
        for question in questions:
            reason = self.grader.ungradable_reason(question)
            if reason is None:
                usable.append(question)
            else:
                reasons[reason] += 1
        for reason, count in reasons.items():
            self._warn(f"{count} of {len(questions)} questions are left out: {reason}")
        if questions and not usable:
            first = next(iter(reasons))
            raise UserError(f"{self.eval_questions.origin}: no answer to any of its questions can be graded: {first}")
        return usable

    def _answers_have_grades(self, questions: list[EvalQuestion]) -> bool:
        if self.reward_model is not None or self.grader.rewards:
            return True
        return self.grader.has_verdicts(questions)

    def _check_losses_alone(self, questions: list[EvalQuestion]) -> None:
        """Warns that answers cannot be graded, unless all questions are plain text. Raises UserError if there are no
        reference answers either."""
        if all(question.is_document for question in questions):
            return
        self._warn(
            "none of the questions has a gold answer, and there is no verifier or reward model: only losses are "
            "measured (use --verifier or --reward-model to grade answers)"
        )
        if all(question.reference is None for question in questions):
            raise UserError(
                "there is nothing to measure: no gold answers, no verifier, no reward model, no reference answers"
            )

    def _warn(self, message: str) -> None:
        self.emit(warning(message))

    def _sampling(self) -> SamplingParams:
        options = self.sampling_options
        stop_ids = self.base.end_ids | self.template.end_ids
        return SamplingParams(
            options.max_new_tokens,
            stop_ids,
            options.temperature,
            options.seed,
            top_p=options.top_p,
        )

    def _settings(self) -> dict[str, Any]:
        """Returns the options of the sampling and the variables of the chat template, as the record stores them."""
        settings = {**asdict(self.sampling_options), "confidence": self.options.confidence}
        if self.template.kwargs:
            settings["chat_template_kwargs"] = dict(self.template.kwargs)
        return settings

    def _record(
        self,
        result: EvalResult,
        tasks: Mapping[str, Metrics],
    ) -> dict[str, Any]:
        """Returns the line of `evals.jsonl`."""
        base = self.base
        confidence = self.options.confidence
        has_verdicts = self.grader.has_verdicts(result.questions)
        ks = self.sampling_options.pass_at_k if has_verdicts else ()
        metric_options = MetricOptions(ks, self.sampling_options.seed, confidence)
        metrics = {}
        deltas = {}
        wins = {}
        for variant in result.variants:
            metrics[variant] = _to_json(variant_metrics(result, variant, metric_options))
            if variant != BASE:
                deltas[variant] = _to_json(deltas_vs_base(result, variant, metric_options))
                wins[variant] = self._wins(result, variant, has_verdicts)
        target = {
            "name": self.target.name,
            "kind": self.target.kind,
            "base": base.name,
            "revision": base.revision,
            "bits": base.bits,
            "variants": result.variants,
        }
        dataset = {
            "origin": self.eval_questions.origin,
            "prompts": len(result.done),
            "planned": len(result.questions),
        }
        return {
            "v": VERSION,
            "kind": "eval",
            "time": self.started,
            "seconds": round(time.time() - self.started, 1),
            "target": target,
            "dataset": dataset,
            "settings": self._settings(),
            "grader": self.grader.grader_name if has_verdicts else "",
            "rewards": {reward.name: reward.weight for reward in self.grader.rewards},
            "reward_model": str(self.reward_model.run) if self.reward_model else None,
            "device": _device_name(base.device),
            "interrupted": result.interrupted,
            "metrics": metrics,
            "deltas": deltas,
            "wins": wins,
            "ungraded": missing_scores(result),
            "tasks": {variant: _to_json(task_metrics) for variant, task_metrics in tasks.items()},
        }

    def _wins(
        self,
        result: EvalResult,
        variant: str,
        has_verdicts: bool,
    ) -> dict[str, Any]:
        """Returns the win rates against the base, by the verifier and by the reward model."""
        confidence = self.options.confidence
        rates: dict[str, Any] = {}
        if has_verdicts:
            rates["verifier"] = win_rates(
                result,
                variant,
                RIGHT,
                confidence,
            )
        if self.reward_model is not None:
            rates["reward_model"] = win_rates(
                result,
                variant,
                REWARD_MODEL_SCORE,
                confidence,
            )
        return {name: rate for name, rate in rates.items() if rate is not None}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _to_json(metrics: Metrics) -> dict[str, Any]:
    return {name: metric.to_dict() for name, metric in metrics.items() if math.isfinite(metric.value)}


def has_metrics(record: Mapping[str, Any]) -> bool:
    """Returns whether an evaluation has any result."""
    return any(record["metrics"].values()) or any(record["tasks"].values())
