"""Held-out measurements during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Finding, PositiveInt, Settings
from lowrank_tune.config.data import SourceConfig


class EvaluationConfig(Settings):
    """Held-out measurements in training."""

    eval_steps: PositiveInt | None = None
    """Steps between evaluations. Default: about ten evaluations per run."""
    eval_dataset: SourceConfig | None = None
    """Prompts with gold answers. The model answers them before and after the run; exact answers and proper stops are
    counted."""
    num_prompts: PositiveInt = 100
    """Number of prompts drawn from it."""
    num_samples: PositiveInt = 1
    """Answers per prompt: 1 is greedy; more are sampled and give pass@1 and pass@k."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of sampled answers."""
    max_new_tokens: PositiveInt = 64
    """Maximum length of an answer in tokens."""
    metric_for_best_model: Literal["loss", "accuracy"] | None = None
    """Metric that selects the best step: `loss` (the lowest validation loss) or `accuracy` (the most held-out questions
    answered exactly, one answer each: greedy, or sampled if `num_samples` is more than 1). Default: `accuracy` for grpo
    and ppo with `eval_dataset`, else `loss`."""
    on_reward_hacking: Literal["warn", "stop"] = "warn"
    """If the reward rises and held-out answers get worse by more than their noise: `warn`, or `stop` the run, with the
    best step as its result. For grpo and ppo with `eval_dataset`."""
    num_completions_to_print: Annotated[int, Field(ge=0)] = 3
    """Number of prompts (held-out ones, else of validation rows) whose answers are shown at every evaluation."""

    def findings(self) -> Iterator[Finding]:
        """Yields the settings of held-out answers without prompts, and a temperature without sampling."""
        if not self.is_set("eval_dataset"):
            for key in ("num_prompts", "num_samples", "temperature"):
                if self.is_set(key):
                    yield (
                        (key,),
                        "does nothing without `evaluate.eval_dataset`",
                    )
        elif self.is_set("temperature") and self.num_samples == 1:
            yield (
                ("temperature",),
                "does nothing with one sample, which is greedy; set `evaluate.num_samples` too",
            )
