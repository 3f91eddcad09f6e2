"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Finding, NonEmptyStr, PositiveInt, Settings

PROJECT_TRACKERS = ("wandb", "trackio", "mlflow")
"""Trackers that sort runs by project. TensorBoard's files are in the run's folder."""
DEFAULT_MICRO_BATCH_ROWS = 4
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class TrainingConfig(Settings):
    """The training loop."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Give this or `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training rows."""
    global_batch_size: PositiveInt | None = None
    """Rows per optimizer step (16 unless `tokens_per_step` is given). With preferences a row is a pair; of plain text a
    pack of documents."""
    prompts_per_step: PositiveInt = 16
    """Prompts per optimizer step, where completions are drawn."""
    tokens_per_step: PositiveInt | None = None
    """In place of `global_batch_size`: as many rows per step as fit in this many tokens."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Rows (or completions) that go through the model at once (4 unless `micro_batch_tokens` is given). With plain text
    in `data.train`, N rows are as many as fit in N times `data.max_length` tokens. `auto`: as many
    as fit in the memory of the GPU by its plan, together with `gradient_checkpointing: auto` those with which the
    update is fastest by estimate (4 without a GPU). Changes memory and speed, never the gradient."""
    micro_batch_tokens: PositiveInt | None = None
    """In place of `micro_batch_size`: as many rows as fit in this many tokens, padding included."""
    length_window: PositiveInt = 1
    """Rows are sorted by length within a window of this many steps, so that the rows of a step need little padding."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate; by default 2e-4 for `sft`, 1e-4 for `reward`, 5e-6 for `dpo` and `kto`, 1e-5 for `grpo` and
    `ppo`."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW in fp32, or that of bitsandbytes with 8-bit states, with paged states, or with both. Paged states need
    CUDA."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay rate of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay rate of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradients are scaled down to this norm; for ppo, those of the value separately."""
    router_aux_loss_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the load-balancing loss of the routers, for mixtures of experts, so that all experts
    are used. Each row has its own loss, so that micro-batches do not change the gradient. Routers and experts
    stay frozen; the metric is `router_aux_loss`."""
    gradient_checkpointing: bool | Literal["none", "all", "auto"] | Annotated[int, Field(ge=0)] = True
    """Recomputes activations in the backward pass: less memory, for one more forward pass of these layers. `all` layers
    (or true), `none` (or false), the first N of them, or `auto`: as few as fit if the run is planned, else all. Never
    changes the gradient."""
    activation_offloading: bool = False
    """Keeps the inputs of recomputed layers in the memory of the machine instead of the GPU: longer rows, more time."""
    mlp_chunks: PositiveInt = 1
    """Computes the MLP of each layer in this many chunks of the sequence, each recomputed in the backward pass: longer
    rows, more time. A chunk has at least 1,024 tokens. Never changes the gradient, except for rounding."""
    torch_compile: bool | Literal["auto"] = "auto"
    """Compiles the decoder layers with torch.compile before the first step: less memory and time for each step. `auto`:
    on a GPU if Triton and a C compiler are installed, and not on the CPU. Before the first step the compiled layers are
    compared with the plain ones, which are used if they differ. Never changes the result, except for rounding."""
    logits_chunk: PositiveInt | Literal["auto"] = "auto"
    """Logits that exist at once, a power of two: the output head runs over as many tokens as have so many. Fewer need
    less memory, more read the head's weight less often. `auto`: 67108864 on a GPU if they fit by plan, else 16777216;
    on the CPU those of 256 tokens, at most 16777216. Never changes the result, except for rounding."""
    memory_budget_gib: Annotated[float, Field(gt=0.0)] | None = None
    """GPU memory that the run may use, in GiB. Default: what is free when the run begins. The keys and values of
    rollouts share it with the update, so it decides how many sequences are decoded at once. Without a GPU it limits
    only those, by default to a quarter of the machine's memory."""
    memory_check: Literal["refuse", "warn", "off"] = "refuse"
    """On a GPU a run is planned before anything is loaded (the command `plan`). If it cannot fit, `refuse` it, or
    `warn` and try; `off` skips the plan."""
    max_nonfinite_steps: PositiveInt = 5
    """Stops after this many steps in a row whose loss or gradient is not finite; each is skipped and counted."""
    logging_steps: PositiveInt = 10
    """Steps between lines of the console. On these steps the KL to the reference is measured too, which needs extra
    forward passes of one micro-batch."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints. Default: about ten checkpoints per run."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints kept, in addition to the best."""
    load_best_model_at_end: bool = True
    """`final/` is the adapter of the best evaluation (`evaluate.metric_for_best_model`); by validation pairs, of DPO
    and reward models, only if it is better than the last one by more than the standard error of their difference. If
    false, that of the last step."""
    final_adapters: Literal["combined", "separate"] = "combined"
    """If frozen adapters are below the trained one: `combined` folds all of them into one adapter in `final/`, exactly,
    whose rank is the sum of theirs; `separate` keeps each in a folder of its own, to be loaded together."""
    report_to: TrackerName | Annotated[tuple[TrackerName, ...], Field(strict=False)] = ()
    """Experiment trackers that also receive steps, held-out figures and settings: tensorboard (files in the run's
    folder), wandb, trackio, mlflow; one, or several in a list."""
    project: NonEmptyStr = "lowrank-tune"
    """Project of the run in wandb and trackio; experiment of the run in mlflow."""

    @property
    def recomputes_layers(self) -> bool:
        """Whether activations of at least one layer may be recomputed."""
        return self.gradient_checkpointing not in ("none", False, 0)

    @property
    def trackers(self) -> tuple[str, ...]:
        """`report_to` as a list."""
        if isinstance(self.report_to, str):
            return (self.report_to,)
        return self.report_to

    @property
    def micro_batch_rows(self) -> int | None:
        """`micro_batch_size` as a number; 4 without one, or for `auto` if the run is not planned; None if
        `micro_batch_tokens` is given instead."""
        if self.micro_batch_size == "auto" or (self.micro_batch_size is None and self.micro_batch_tokens is None):
            return DEFAULT_MICRO_BATCH_ROWS
        return self.micro_batch_size

    def findings(self) -> Iterator[Finding]:
        """Yields a missing end of the run, a warm-up that does not finish before it, offloading without recomputed
        layers, compiled layers with MLPs in chunks or with the loss of routers, a project without a tracker that has
        projects, and a chunk of logits that is no power of two."""
        if not self.is_set("max_steps") and not self.is_set("num_train_epochs"):
            yield (
                ("max_steps",),
                "is missing: give `train.max_steps` or `train.num_train_epochs`",
            )
        if self.is_set("activation_offloading") and self.activation_offloading and not self.recomputes_layers:
            yield (
                ("activation_offloading",),
                "does nothing without `train.gradient_checkpointing`: it moves what recomputed layers keep",
            )
        if self.torch_compile is True and self.mlp_chunks > 1:
            yield (
                ("torch_compile",),
                "contradicts `train.mlp_chunks`: layers whose MLPs run in chunks are not compiled; leave out one "
                "of the two",
            )
        if self.torch_compile is True and self.router_aux_loss_coef:
            yield (
                ("torch_compile",),
                "contradicts `train.router_aux_loss_coef`, with which layers are not compiled; leave out one of "
                "the two",
            )
        if self.is_set("project") and set(PROJECT_TRACKERS).isdisjoint(self.trackers):
            yield (
                ("project",),
                f"does nothing without `train.report_to`: {', '.join(PROJECT_TRACKERS)} (TensorBoard's files are in "
                "the run's folder)",
            )
        if self.logits_chunk != "auto" and self.logits_chunk.bit_count() != 1:
            yield (
                ("logits_chunk",),
                f"must be a power of two, such as 16777216, found {self.logits_chunk}",
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            yield (
                ("warmup_steps",),
                f"must be smaller than `train.max_steps`, {self.max_steps}",
            )
