"""The kit's own trainer, roles and engine on the fake GPU, and what a step of them would make it do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_proof.factories import ALGORITHMS, GENERATIVE, PAIRED, TRAINED_ROLES, make_roles
from gpu_proof.synthetic import (
    AdapterSettings,
    DPOSettings,
    GRPOSettings,
    Size,
    TrainSettings,
    full_rows,
    ragged_rows,
)
from kernel_counter import CUDA, KernelCounter
from kernel_totals import Totals
from python_calls import counting_calls
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext, StepBatch
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.batch import Batch, PairBatch, RolloutBatch
from lowrank_tune.generation import Engine, engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.memory_planner.fake_device import replaced
from lowrank_tune.model.activation_checkpointing import Checkpointing
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles
from lowrank_tune.training.trainer import Trainer, make_optimizer

STEPS = 3
COUNTED_STEP = 1
"""The first and the last step are logging steps; the one between them is counted, and the last one is left out."""
NEW_TOKENS = 8
PROMPT = 16


@dataclass
class StepTotals:
    """One optimizer step: the collection of its rows, its micro-batches together, and the rest."""

    collect: Totals = field(default_factory=Totals)
    micro: Totals = field(default_factory=Totals)
    rest: Totals = field(default_factory=Totals)
    num_micro_batches: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "collect": self.collect.to_json(),
            "micro": self.micro.to_json(),
            "rest": self.rest.to_json(),
            "num_micro_batches": self.num_micro_batches,
        }


class CountingTrainer(Trainer):
    """A trainer whose work is counted by phase, for each step."""

    counter: KernelCounter
    step_totals: list[StepTotals]

    def _step(self) -> None:
        self.step_totals.append(StepTotals())
        self.counter.totals = self.step_totals[-1].rest
        super()._step()
        self.should_stop = self.state.step > COUNTED_STEP

    def _accumulate(self, minibatch: Batch) -> Any:
        self.step_totals[-1].num_micro_batches += len(list(self._split_micro_batches(minibatch)))
        self.counter.totals = self.step_totals[-1].micro
        return super()._accumulate(minibatch)

    def _clip_gradients(self) -> Tensor:
        # Everything after the last micro-batch.
        self.counter.totals = self.step_totals[-1].rest
        return super()._clip_gradients()


def small_size(algorithm: str) -> Size:
    """Returns four rows, pairs or completions in micro-batches of two."""
    if algorithm in GENERATIVE:
        return Size(4, 2, PROMPT + NEW_TOKENS, prompt=PROMPT, group=2)
    if algorithm in PAIRED:
        return Size(8, 4, 48)
    return Size(4, 2, 48)


def count_training_step(
    counter: KernelCounter,
    base: Base,
    algorithm: str,
    checkpointing: Checkpointing,
    offload: bool = False,
) -> StepTotals:
    """Returns what a step of a run does that is neither the first, which checks, nor logged."""
    roles_trained = TRAINED_ROLES.get(algorithm, ("policy",))
    size = small_size(algorithm)
    roles = make_roles(
        base,
        roles_trained,
        checkpointing,
        offload=offload,
    )
    # Fast paths cannot be compared: a fake GPU has no numbers.
    roles.verified = True
    vocabulary = base.model.config.vocab_size
    together = 2 if algorithm in PAIRED else 1

    def rows(step: int) -> Batch:
        with _disable_current_modes():
            return ragged_rows(size, vocabulary, together)

    built = ALGORITHMS[algorithm](roles, rows, size)
    trainer = _counting_trainer(counter, built, roles, roles_trained, size.micro // together)
    try:
        trainer.run()
        for role in roles_trained:
            _check_gradients_were_made(trainer, roles, role)
    finally:
        roles.unload_adapters()
    return trainer.step_totals[COUNTED_STEP]


def _counting_trainer(
    counter: KernelCounter,
    algorithm: Algorithm[Any],
    roles: Roles,
    roles_trained: Sequence[str],
    micro_batch_size: int,
) -> CountingTrainer:
    parameters = [parameter for role in roles_trained for parameter in roles.parameters(role)]
    settings: Any = TrainSettings(micro_batch_size)
    trainer = CountingTrainer(
        algorithm=algorithm,
        parameters=parameters,
        optimizer=make_optimizer(parameters, settings, CUDA),
        train=settings,
        steps=STEPS,
        seed=0,
        device=CUDA,
        emit=_ignore,
        on_step_end=_ignore,
        limits=roles.limits,
    )
    trainer.counter = counter
    trainer.step_totals = []
    collect = algorithm.collect

    def counted_collect(step: int) -> StepBatch[Any]:
        counter.totals = trainer.step_totals[-1].collect
        collected = collect(step)
        counter.totals = trainer.step_totals[-1].rest
        return collected

    algorithm.collect = counted_collect  # type: ignore[method-assign]
    return trainer


def _ignore(*_: Any) -> None:
    return None


def _check_gradients_were_made(
    trainer: CountingTrainer,
    roles: Roles,
    role: str,
) -> None:
    """Raises AssertionError unless the optimizer has moments, in fp32 and on the fake GPU, of each trained weight."""
    for name, parameter in roles.named_parameters(role).items():
        state = trainer.optimizer.state[parameter]
        moment = state["exp_avg"]
        assert moment.is_cuda and moment.dtype == torch.float32, f"{name}: {moment.device}, {moment.dtype}"


def sft_rows(rows: int, length: int, vocabulary: int) -> Batch:
    with _disable_current_modes():
        return full_rows(Size(rows, rows, length), vocabulary)


def pair_rows(pairs: int, prompt: int, answer: int) -> PairBatch:
    """Returns pairs whose rows share their prompt."""
    with _disable_current_modes():
        ids, attended, answers = _group_tensors(2 * pairs, prompt, answer, 2)
        first = torch.arange(2 * pairs) % 2 == 0
        return PairBatch(
            ids,
            attended,
            answers,
            shared_prefix=torch.where(first, 0, prompt),
            margin=torch.zeros(2 * pairs),
            row_indices=torch.arange(2 * pairs),
            reference_sequence_logps=torch.zeros(2 * pairs),
        )


def group_rows(completions: int, prompt: int, answer: int) -> RolloutBatch:
    """Returns the completions of one prompt."""
    with _disable_current_modes():
        ids, attended, answers = _group_tensors(completions, prompt, answer, completions)
        shared = torch.full((completions,), prompt)
        shared[0] = 0
        return RolloutBatch(
            ids,
            attended,
            answers,
            shared_prefix=shared,
            sampler_logps=torch.zeros(ids.shape),
            reference_logps=torch.zeros(ids.shape),
            sequence_advantages=torch.ones(completions),
        )


def _group_tensors(
    rows: int,
    prompt: int,
    answer: int,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (rows, prompt + answer), generator=generator)
    ids[:, :prompt] = ids[torch.arange(rows) // group * group, :prompt]
    # The shared beginning ends here.
    ids[:, prompt] = torch.arange(rows) + 3
    attended = torch.ones_like(ids, dtype=torch.bool)
    return ids, attended, attended & (torch.arange(ids.shape[1]) >= prompt)


class _Rollouts:
    """What GRPO's losses read of a collector."""

    temperature = 1.0
    max_new_tokens = 400


def micro_batch_algorithm(name: str, roles: Roles) -> Algorithm[Any]:
    """Returns an algorithm that computes losses of given rows, and collects none."""
    context = AlgorithmContext(roles)
    settings: Any
    if name == "sft":
        return SFT(context)
    if name == "dpo":
        settings = DPOSettings()
        return DPO(context, settings)
    settings = GRPOSettings()
    collector: Any = _Rollouts()
    return GRPO(context, settings, collector)


def count_micro_batch(
    counter: KernelCounter,
    algorithm: Algorithm[Any],
    batch: Batch,
) -> Totals:
    """Returns what forward and backward passes of one micro-batch do, its copy to the GPU included."""
    with _disable_current_modes():
        batch.token_weights = algorithm.token_weights(batch)
    roles = algorithm.context.roles
    # Decided once for a model, by comparisons.
    _ = roles.decoder.max_shareable_length
    _ = roles.decoder.runs_without_masks
    roles.verified = True
    # The made-up GPU has no variable-length attention.
    roles.decoder.packed_rows.enabled = False
    # Gradients that exist would be added to, which the trainer does apart.
    for parameter in roles.parameters("policy"):
        parameter.grad = None
    with counter.counting() as totals:
        for term in algorithm.compute_losses(batch.to(CUDA)):
            term.loss.backward()  # type: ignore[no-untyped-call]
    return totals


def count_step(
    counter: KernelCounter,
    base: Base,
    checkpointing: Checkpointing,
    rows: int,
    length: int,
) -> Totals:
    """Returns what one SFT micro-batch does: forward, head, and backward."""
    roles = make_roles(base, ("policy",), checkpointing)
    try:
        batch = sft_rows(rows, length, base.model.config.vocab_size)
        return count_micro_batch(counter, micro_batch_algorithm("sft", roles), batch)
    finally:
        roles.unload_adapters()


@contextmanager
def stacked_roles(base: Base, frozen: Sequence[str] = ()) -> Iterator[Roles]:
    """Yields roles whose policy is trained over these frozen adapters."""
    names = [*frozen, "policy"]
    settings: Any = AdapterSettings()
    roles = Roles(
        base,
        {name: lora_config(settings, base.model) for name in names},
        ["policy"],
        {"policy": names, "reference": list(frozen)},
        "all",
    )
    try:
        yield roles
    finally:
        roles.unload_adapters()


def count_decode_step(
    counter: KernelCounter,
    roles: Roles,
    batch: int,
    width: int,
    stream: bool = False,
) -> Totals:
    """Returns what one decoding step of `batch` sequences does, at `width` columns: the difference between calls of the
    engine that draw three tokens and two. The step is the one that is captured on a GPU: the fake GPU captures
    nothing."""
    roles.decoding.cuda_graphs = False
    # Prompts of two lengths, so that the step needs a mask.
    prompts = [[5] * (width - 2)]
    if batch > 1:
        prompts.append([5] * (width - 3))
    # Modules are compared, and sizes measured, once.
    _draw(counter, roles, prompts[:1], 1, 2, stream)
    shorter = _draw(counter, roles, prompts, batch, 2, stream)
    longer = _draw(counter, roles, prompts, batch, 3, stream)
    return longer.minus(shorter)


def count_calls_of_graphed_step(
    roles: Roles,
    batch: int,
    stream: bool = False,
) -> int:
    """Returns the calls of Python functions in a step of `batch` sequences that is replayed, by a graph that does
    nothing: those of the host's own work for each token, too."""
    roles.decoding.cuda_graphs = True
    counter = KernelCounter()
    with replaced(engine, "CudaCapture", _NoCapture):
        # The first two steps of each draw run plain and are captured.
        _, shorter, longer = [_draw(counter, roles, [[5] * 4], batch, 1 + steps, stream) for steps in (8, 8, 24)]
    assert roles.decoding.num_replays, "no step was replayed"
    return round(longer.minus(shorter).python_calls / 16)


class _NoCapture:
    """Captures nothing, and replays nothing."""

    def check(self, run: Callable[[], None]) -> None:
        run()

    def __call__(self, run: Callable[[], None]) -> _NoCapture:
        return self

    def replay(self) -> None:
        pass


def _draw(
    counter: KernelCounter,
    roles: Roles,
    prompts: list[list[int]],
    batch: int,
    new_tokens: int,
    stream: bool,
) -> Totals:
    decoding = Engine(roles, "policy", batch)
    sampling = SamplingParams(new_tokens, frozenset())
    draw = decoding.stream if stream else decoding.generate
    with counter.counting() as totals, counting_calls() as counted:
        outputs = list(draw(prompts, batch // len(prompts), sampling))
    assert outputs
    totals.python_calls = counted.calls
    return totals
