"""Options of an evaluation: as given, and with the defaults of the recipe filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lowrank_tune.config import EvaluationConfig, RecipeConfig
from lowrank_tune.data.templates.template_kwargs import TemplateKwargs
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.intervals import CONFIDENCE

NUM_PROMPTS = 100
"""Default without a recipe."""
MAX_NEW_TOKENS = 256
"""Default without a recipe."""


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
    chat_template_kwargs: TemplateKwargs = field(default_factory=dict)

    @property
    def has_questions(self) -> bool:
        """Whether held-out questions are evaluated, beside tasks or without."""
        return self.dataset is not None or not self.tasks

    def check(self) -> None:
        """Raises UserError for an option that needs another one."""
        if not self.tasks and (self.tasks_path is not None or self.limit is not None):
            raise UserError("--tasks-path and --limit belong to --tasks, which is not given")
        if self.dataset is None and (self.dataset_config or self.split):
            raise UserError("--dataset-config and --split need --dataset, which is not given")


@dataclass(frozen=True)
class EvalSamplingOptions:
    """How many prompts are drawn, and how answers are sampled, as the record stores it."""

    num_prompts: int
    num_samples: int
    pass_at_k: tuple[int, ...]
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


def resolve_options(options: Options, recipe: RecipeConfig | None) -> EvalSamplingOptions:
    """Returns the options with defaults filled in. Raises UserError for options that contradict each other."""
    defaults = EvaluationConfig(
        num_prompts=NUM_PROMPTS,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    seed = 0
    if recipe is not None:
        defaults = recipe.evaluate
        seed = recipe.seed
    if options.seed is not None:
        seed = options.seed
    num_samples = options.num_samples or defaults.num_samples
    temperature = _temperature(options, num_samples, defaults)
    ks = tuple(sorted({1, *(options.pass_at_k or (num_samples,))}))
    if ks[-1] > num_samples:
        raise UserError(
            f"--pass-at-k {ks[-1]} needs as many answers per prompt: --num-samples {ks[-1]} (here it is {num_samples})"
        )
    return EvalSamplingOptions(
        options.num_prompts or defaults.num_prompts,
        num_samples,
        ks,
        temperature,
        options.top_p,
        options.max_new_tokens or _max_new_tokens(recipe, defaults),
        seed,
    )


def _temperature(
    options: Options,
    num_samples: int,
    defaults: EvaluationConfig,
) -> float:
    """Returns the temperature, 0 for one answer per prompt. Raises UserError if it does not fit the other options."""
    temperature = options.temperature
    if temperature is None:
        temperature = defaults.temperature if num_samples > 1 else 0.0
    if num_samples > 1 and temperature == 0:
        raise UserError("--num-samples: greedy answers are all the same; leave it out, or set --temperature above 0")
    if options.top_p < 1 and temperature == 0:
        raise UserError("--top-p does not change greedy answers; set --temperature above 0 too")
    return temperature


def _max_new_tokens(recipe: RecipeConfig | None, defaults: EvaluationConfig) -> int:
    """Returns the limit of the run's held-out answers, or of its completions if it had no held-out questions."""
    if recipe is not None and recipe.is_online and defaults.eval_dataset is None:
        return recipe.rollout.max_new_tokens
    return defaults.max_new_tokens
