"""The loop, and what is measured beside it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.settings.common import NonEmptyStr, PositiveInt, Settings
from lowrank_tune.settings.data import SourceConfig

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrainingConfig(Settings):
    """The loop."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Give this or `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training rows."""
    global_batch_size: PositiveInt | None = None
    """Rows of one optimizer step (16 unless `tokens_per_step` is given). With preferences a row is a pair."""
    prompts_per_step: PositiveInt = 16
    """Prompts of one optimizer step, where completions are drawn."""
    tokens_per_step: PositiveInt | None = None
    """Or: as many rows as fit this many tokens."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Rows (completions, where they are drawn) that go through the model at once (4 unless `micro_batch_tokens` is
    given); `auto`: as many as fit the card by its plan, together with `gradient_checkpointing: auto` no more than speed
    needs (4 where there is no card). Changes memory and speed, never the gradient."""
    micro_batch_tokens: PositiveInt | None = None
    """Or: as many rows as fit this many tokens, padding counted."""
    length_window: PositiveInt = 1
    """Rows are sorted by length within a window of this many steps, so that rows of a step need little padding."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate; by default 2e-4 for `sft`, 1e-4 for `reward`, 5e-6 for `dpo`, 1e-5 for `grpo` and `ppo`."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises from 0."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW in fp32; bitsandbytes' 8-bit and paged ones need CUDA."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled decay."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are scaled down to this norm, those of a value by themselves."""
    gradient_checkpointing: bool | Literal["none", "all", "auto"] | Annotated[int, Field(ge=0)] = True
    """Recompute activations in the backward pass: less memory, about a third more time. `all` layers (or true), `none`
    (or false), the first N of them, or `auto`: as few as fit where the run is planned, else all. Never changes the
    gradient."""
    activation_offloading: bool = False
    """Keep what recomputed layers begin with in the machine's memory instead of the card's: longer rows, a little more
    time."""
    memory_budget_gib: Annotated[float, Field(gt=0.0)] | None = None
    """Memory of the card that the run may use, in GiB; all of it where it is not given. The keys and values of rollouts
    share it with the update, so it decides how many sequences are decoded at once. Without a card it bounds those
    alone, a quarter of the machine's memory by default."""
    memory_check: Literal["refuse", "warn", "off"] = "refuse"
    """On a card a run is planned before anything is loaded (`lowrank-tune plan`). What cannot fit is refused, or told
    and tried, or not looked at."""
    max_nonfinite_steps: PositiveInt = 5
    """Stops after this many steps in a row whose loss or gradient is not finite; each is skipped and counted."""
    logging_steps: PositiveInt = 10
    """Steps between lines of the console. On these steps KL to the reference is measured too, which costs forwards of a
    micro-batch."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; about ten over the run where it is not given."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints kept, besides the best."""
    load_best_model_at_end: bool = True
    """Whether `final/` is the adapter of the best evaluation (`evaluate.metric_for_best_model`), else that of the last
    step."""
    final_adapters: Literal["combined", "separate"] = "combined"
    """Where frozen adapters lie below the trained one: `final/` is all of them folded into one adapter, exactly, whose
    rank is the sum of theirs; or each stays apart in a folder of its own, to be loaded together."""
    report_to: TrackerName | Annotated[tuple[TrackerName, ...], Field(strict=False)] = ()
    """Experiment trackers that are told steps, held-out figures and settings too: tensorboard (files in the run's
    folder), wandb, trackio, mlflow; one, or several in a list."""
    project: NonEmptyStr = "lowrank-tune"
    """The project (of mlflow: the experiment) that wandb, trackio and mlflow file the run under."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """`report_to` as a list."""
        return (self.report_to,) if isinstance(self.report_to, str) else self.report_to

    @property
    def micro_batch_rows(self) -> int | None:
        """`micro_batch_size` as a number; 4 for `auto`, where nobody has planned it."""
        return 4 if self.micro_batch_size == "auto" else self.micro_batch_size


class EvaluationConfig(Settings):
    """Held-out measurements while training."""

    eval_steps: PositiveInt | None = None
    """Steps between evaluations; about ten over the run where it is not given."""
    eval_dataset: SourceConfig | None = None
    """Prompts with gold answers: the model answers them before and after the run, and exact answers and proper stops
    are counted."""
    num_prompts: PositiveInt = 100
    """How many of them."""
    num_samples: PositiveInt = 1
    """Answers for each prompt: 1 is greedy, more are sampled and give pass@1 and pass@k."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of sampled answers."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens."""
    metric_for_best_model: Literal["loss", "accuracy"] | None = None
    """What makes a step the best: the lowest validation loss, or the most held-out questions answered exactly, one
    answer each (greedy, or sampled where `num_samples` is more than 1). Where it is not given: `accuracy` for grpo and
    ppo with `eval_dataset`, else `loss`."""
    on_reward_hacking: Literal["warn", "stop"] = "warn"
    """What to do where the reward rises and held-out answers get worse by more than their noise: say so; or end the run
    there too, with the best step as its result. For grpo and ppo with `eval_dataset`."""
    num_completions_to_print: Annotated[int, Field(ge=0)] = 3
    """Prompts (held-out ones, else of validation rows) whose answers are shown at every evaluation."""
