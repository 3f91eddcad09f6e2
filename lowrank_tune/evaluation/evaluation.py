"""`lowrank-tune eval`: base and tuned variants from the same weights on held-out questions and tasks, and the
record that is kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_tune.config import EvaluationConfig, RecipeConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation import lm_eval
from lowrank_tune.evaluation.evaluator import EvalResult, Evaluator
from lowrank_tune.evaluation.grading import Grader
from lowrank_tune.evaluation.intervals import CONFIDENCE
from lowrank_tune.evaluation.metrics import Metrics, deltas_vs_base, missing_scores, variant_metrics, win_rates
from lowrank_tune.evaluation.questions import (
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
    device_name,
    resolve_reward_model,
    resolve_target,
    roles_for,
)
from lowrank_tune.events import Emit, LogMessage, Progress
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.base import Base, load_base, load_config, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, fixed_rope, select_factors

# where no recipe says
PROMPTS = 100
NEW_TOKENS = 256


@dataclass(frozen=True)
class Options:
    """Options of an evaluation. None is the value of the run's recipe, or a default if there is no recipe."""

    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    num_prompts: int | None = None
    num_samples: int | None = None
    pass_at_k: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int | None = None
    verifier: str | None = None
    reward_model: Path | None = None
    confidence: float = CONFIDENCE
    bits: Literal[4, 16] | None = None
    tasks: tuple[str, ...] = ()
    tasks_path: Path | None = None
    limit: int | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class EvalSamplingOptions:
    """How answers are drawn, settled."""

    num_prompts: int
    num_samples: int
    ks: tuple[int, ...]
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_prompts,
            "num_samples": self.num_samples,
            "pass_at_k": list(self.ks),
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


def resolve_options(options: Options, recipe: RecipeConfig | None) -> EvalSamplingOptions:
    """Fills in what was not asked for. Raises UserError for what contradicts itself."""
    if recipe is not None:
        defaults = recipe.evaluate
    else:
        defaults = EvaluationConfig(num_prompts=PROMPTS, max_new_tokens=NEW_TOKENS)
    num_samples = options.num_samples or defaults.num_samples
    if options.temperature is not None:
        temperature = options.temperature
    elif num_samples > 1:
        temperature = defaults.temperature
    else:
        temperature = 0.0
    if num_samples > 1 and temperature == 0:
        raise UserError("--num-samples: greedy answers are all the same; leave it out, or set --temperature above 0")
    if options.top_p < 1 and temperature == 0:
        raise UserError("--top-p does nothing to greedy answers; give a --temperature above 0 too")
    ks = tuple(sorted({1, *(options.pass_at_k or (num_samples,))}))
    if ks[-1] > num_samples:
        raise UserError(
            f"--pass-at-k {ks[-1]} needs as many answers per prompt: --num-samples {ks[-1]} (here it is {num_samples})"
        )
    max_new_tokens = options.max_new_tokens or _max_new_tokens(recipe, defaults)
    if options.seed is not None:
        seed = options.seed
    elif recipe is not None:
        seed = recipe.seed
    else:
        seed = 0
    return EvalSamplingOptions(
        options.num_prompts or defaults.num_prompts,
        num_samples,
        ks,
        temperature,
        options.top_p,
        max_new_tokens,
        seed,
    )


def _max_new_tokens(recipe: RecipeConfig | None, defaults: EvaluationConfig) -> int:
    """Held-out answers as the run drew them; where it had none, as it drew its completions."""
    online = recipe is not None and recipe.algorithm in ("grpo", "ppo") and defaults.eval_dataset is None
    if recipe is not None and online:
        return recipe.rollout.max_new_tokens
    return defaults.max_new_tokens


def evaluate(given: str, options: Options, emit: Emit, device: torch.device | None = None) -> Evaluation:
    """Measures a run, a chain, an adapter or a model. Ctrl-C keeps what was measured. Raises UserError, what is cheap
    to check first."""
    task_manager: Any = None
    if options.tasks:
        task_manager = lm_eval.make_task_manager(options.tasks, options.tasks_path)
    elif options.tasks_path is not None or options.limit is not None:
        raise UserError("--tasks-path and --limit belong to --tasks, which is not given")
    if (options.dataset_config or options.split) and options.dataset is None:
        raise UserError("--dataset-config and --split need --dataset, which is not given")
    target = resolve_target(given, options.bits, emit)
    sampling_options = resolve_options(options, target.recipe)
    if options.reward_model is not None:
        reward_model = resolve_reward_model(options.reward_model)
    else:
        reward_model = None
    if reward_model is not None:
        check_reward_model(target, reward_model)
    if target.recipe is not None:
        template_date = target.recipe.data.template_date
    else:
        template_date = None
    template = ChatTemplate.from_tokenizer(load_tokenizer(target.base), template_date)
    has_questions = options.dataset is not None or not options.tasks
    if has_questions:
        eval_questions = _questions(target, options, sampling_options, template, emit)
    else:
        eval_questions = EvalQuestions([], "")
    recipe = target.recipe if has_questions else None
    with Grader(recipe, options.verifier if has_questions else None, reward_model is not None, template) as grader:
        max_new_tokens = sampling_options.max_new_tokens
        factors, eval_questions = _select_rope(target, eval_questions, max_new_tokens, emit, reward_model)
        base = _load(target, template, device, emit, factors)
        check_bases(target, reward_model, base, emit)
        roles = roles_for(target, reward_model, base)
        grader.set_base_model(roles)
        return _EvalRun(target, options, sampling_options, eval_questions, reward_model, task_manager, emit).run(
            roles,
            base,
            template,
            grader,
        )


def _select_rope(
    target: EvalTarget,
    eval_questions: EvalQuestions,
    max_new_tokens: int,
    emit: Emit,
    reward_model: EvalRewardModel | None = None,
) -> tuple[RopeFactors, EvalQuestions]:
    """The rotary frequencies that the target was trained with, else the reward model's, else those for the longest row;
    and the questions that make no row which is longer than these are for. Raises UserError where none is left."""
    config = load_config(target.base)
    questions = eval_questions.questions
    lengths = [_row_length(question, max_new_tokens) for question in questions]
    trained = target.rope_factors or (reward_model.rope_factors if reward_model is not None else None)
    factors = trained or select_factors(config, max(lengths, default=0))
    rope = fixed_rope(config, factors)
    if rope is None:
        return factors, eval_questions
    emit(LogMessage(message=rope.describe()))
    limit = rope.max_row_length or max(lengths, default=0)
    usable = [question for question, length in zip(questions, lengths, strict=True) if length <= limit]
    if questions and not usable:
        rope.check_row_length(min(lengths))
    if len(usable) < len(questions):
        message = (
            f"{len(questions) - len(usable)} of {len(questions)} questions are left out: with an answer of up to "
            f"{max_new_tokens:,} tokens they have more than {limit:,}, the limit of the base's {rope.name}"
        )
        emit(LogMessage(level="warning", message=message))
    return factors, EvalQuestions(usable, eval_questions.origin)


def _row_length(question: EvalQuestion, max_new_tokens: int) -> int:
    """Tokens of a question with the longer of its answer and its reference answer."""
    if question.reference is not None:
        reference = len(question.reference.input_ids)
    else:
        reference = 0
    return max(len(question.prompt_ids) + max_new_tokens, reference)


def _load(
    target: EvalTarget,
    template: ChatTemplate,
    device: torch.device | None,
    emit: Emit,
    rope_factors: RopeFactors,
) -> Base:
    label = f"loading {target.base.model}"
    emit(Progress(description=label, done=0, total=1))
    base = load_base(target.base, template.tokenizer, device, rope_factors=rope_factors)
    emit(Progress(description=label, done=1, total=1))
    return base


def _questions(
    target: EvalTarget,
    options: Options,
    sampling_options: EvalSamplingOptions,
    template: ChatTemplate,
    emit: Emit,
) -> EvalQuestions:
    if options.dataset is not None:
        source = eval_source(options.dataset, options.dataset_config, options.split, target.recipe)
        if target.recipe is not None:
            system = target.recipe.data.system_prompt
        else:
            system = None
        return load_eval_questions(source, sampling_options.num_prompts, sampling_options.seed, template, system)
    if target.recipe is None:
        raise UserError(
            f"{target.name} is not a run and has no held-out questions: give --dataset FILE, a hub data set, or --tasks"
        )
    return recipe_heldout_questions(target.recipe, sampling_options.num_prompts, template, emit)


@dataclass
class _EvalRun:
    """One evaluation on the loaded base."""

    target: EvalTarget
    options: Options
    sampling_options: EvalSamplingOptions
    eval_questions: EvalQuestions
    reward_model: EvalRewardModel | None
    task_manager: Any
    emit: Emit
    started: float = field(default_factory=time.time)

    def run(self, roles: Roles, base: Base, template: ChatTemplate, grader: Grader) -> Evaluation:
        variants = [BASE, *self.target.variants]
        usable = self._gradable_questions(grader)
        answering = grader.has_verdicts(usable) or bool(grader.rewards) or self.reward_model is not None
        if usable and not answering:
            self.emit(
                LogMessage(
                    level="warning",
                    message="none of the questions has a gold answer, and there is no verifier or reward model: "
                    "only losses are measured (use --verifier or --reward-model to grade answers)",
                )
            )
            if not any(question.reference is not None for question in usable):
                raise UserError(
                    "there is nothing to measure: no gold answers, no verifier, no reward model, no reference answers"
                )
        sampling_options = self.sampling_options
        sampling = SamplingParams(
            sampling_options.max_new_tokens,
            base.end_ids | template.end_ids,
            sampling_options.temperature,
            sampling_options.seed,
            top_p=sampling_options.top_p,
        )
        result = Evaluator(
            roles,
            template,
            grader,
            sampling,
            sampling_options.num_samples,
            answering,
            self.emit,
        ).measure(variants, usable, sampling_options.seed)
        tasks = dict[str, Metrics]()
        stopped = result.interrupted
        if self.options.tasks and not stopped:
            tasks, stopped = lm_eval.run_tasks(roles, base, template, variants, self._tasks(), self.emit)
        record = self._record(result, tasks, base, grader, stopped)
        return Evaluation(record, self.target.folder / EVALS if self.target.folder is not None else None, stopped)

    def _tasks(self) -> lm_eval.Tasks:
        options = self.options
        return lm_eval.Tasks(
            options.tasks,
            options.limit,
            options.confidence,
            self.sampling_options.seed,
            options.apply_chat_template,
            self.task_manager,
        )

    def _gradable_questions(self, grader: Grader) -> list[Any]:
        """The questions whose answers can be graded; a warning names the others."""
        reasons: dict[str, int] = {}
        usable = []
        for question in self.eval_questions.questions:
            reason = grader.ungradable_reason(question)
            if reason is None:
                usable.append(question)
            else:
                reasons[reason] = reasons.get(reason, 0) + 1
        for reason, count in reasons.items():
            self.emit(
                LogMessage(
                    level="warning",
                    message=f"{count} of {len(self.eval_questions.questions)} questions are left out: {reason}",
                )
            )
        if self.eval_questions.questions and not usable:
            raise UserError(
                f"{self.eval_questions.origin}: no answer to any of its questions can be graded: {next(iter(reasons))}"
            )
        return usable

    def _record(
        self,
        result: EvalResult,
        tasks: Mapping[str, Metrics],
        base: Base,
        grader: Grader,
        stopped: bool,
    ) -> dict[str, Any]:
        sampling_options = self.sampling_options
        confidence = self.options.confidence
        tuned = [variant for variant in result.variants if variant != BASE]
        ks = sampling_options.ks if grader.has_verdicts(result.questions) else ()
        seed = sampling_options.seed
        return {
            "v": VERSION,
            "kind": "eval",
            "time": self.started,
            "seconds": round(time.time() - self.started, 1),
            "target": {
                "name": self.target.name,
                "kind": self.target.kind,
                "base": base.name,
                "revision": base.revision,
                "bits": base.bits,
                "variants": result.variants,
            },
            "dataset": {
                "origin": self.eval_questions.origin,
                "prompts": len(result.done),
                "planned": len(result.questions),
            },
            "settings": {**sampling_options.to_dict(), "confidence": confidence},
            "grader": grader.grader_name if ks else "",
            "rewards": {weighted_reward.name: weighted_reward.weight for weighted_reward in grader.rewards},
            "reward_model": str(self.reward_model.run) if self.reward_model else None,
            "device": device_name(base.device),
            "interrupted": stopped,
            "metrics": {
                variant: _to_json(variant_metrics(result, variant, ks, seed, confidence)) for variant in result.variants
            },
            "deltas": {variant: _to_json(deltas_vs_base(result, variant, ks, seed, confidence)) for variant in tuned},
            "wins": {variant: self._wins(result, variant, bool(ks)) for variant in tuned},
            "ungraded": missing_scores(result),
            "tasks": {variant: _to_json(task_metrics) for variant, task_metrics in tasks.items()},
        }

    def _wins(self, result: EvalResult, variant: str, has_verdicts: bool) -> dict[str, Any]:
        confidence = self.options.confidence
        rates = dict[str, Any]()
        if has_verdicts:
            rates["verifier"] = win_rates(
                result,
                variant,
                lambda answer: None if answer.right is None else float(answer.right),
                confidence,
            )
        if self.reward_model is not None:
            rates["reward_model"] = win_rates(result, variant, lambda answer: answer.score, confidence)
        return {name: win_rate for name, win_rate in rates.items() if win_rate is not None}


def _to_json(figures: Metrics) -> dict[str, Any]:
    return {name: metric.to_dict() for name, metric in figures.items() if math.isfinite(metric.value)}


def has_metrics(record: Mapping[str, Any]) -> bool:
    """Whether anything was measured."""
    parts: Sequence[Any] = [*record["metrics"].values(), *record["tasks"].values()]
    return any(parts)
