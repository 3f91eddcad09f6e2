"""lowrank_tune's own loop: the frozen SFT adapter below the policy over the shared base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from learning_curves import setup
from learning_curves.meter import Meter
from learning_curves.reward import RewardClient
from learning_curves.task import EPSILON, LOGGING_STEPS, MAX_GRAD_NORM, MAX_NEW_TOKENS, TEMPERATURE, Pair, Task


def train_config(task: Task) -> Any:
    """Returns the settings of the loop."""
    from lowrank_tune.config import TrainingConfig

    settings = task.settings
    return TrainingConfig(
        max_steps=settings.steps,
        global_batch_size=settings.units,
        micro_batch_size=settings.micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        max_grad_norm=MAX_GRAD_NORM,
        gradient_checkpointing=False,
        logging_steps=LOGGING_STEPS,
    )


def train(task: Task, meter: Meter, roles: Any, algorithm: Any, value: Callable[[Mapping[str, float]], float]) -> None:
    """Runs all steps; `value` returns the loss or mean reward of a step from its metrics."""
    import torch

    from lowrank_tune.events import StepEnd
    from lowrank_tune.training.trainer import Trainer, make_optimizer

    values: list[float] = []

    def emit(event: Any) -> None:
        if isinstance(event, StepEnd):
            values.append(value(event.stats))

    def end_step(*_: Any) -> None:
        meter.end_step(values[-1])

    config, device, parameters = train_config(task), torch.device("cpu"), roles.parameters("policy")
    optimizer = make_optimizer(parameters, config, device)
    loop = Trainer(algorithm, parameters, optimizer, config, task.settings.steps, task.seed, device, emit, end_step)
    meter.start_training()
    loop.run()


def grpo(task: Task, meter: Meter) -> None:
    """GRPO with the kit's engine."""
    from lowrank_tune.algorithms.base import AlgorithmContext
    from lowrank_tune.algorithms.grpo import GRPO
    from lowrank_tune.config import GRPOConfig

    template, roles = setup.stacked_roles(task)
    meter.tensors = adapter_of(roles)
    config = GRPOConfig(beta=task.settings.beta, epsilon=EPSILON, zero_std_groups="keep")
    algorithm = GRPO(AlgorithmContext(roles), config, collector_of(task, template, roles))
    train(task, meter, roles, algorithm, itemgetter("reward"))


def collector_of(task: Task, template: Any, roles: Any) -> Any:
    """Returns the collector of rollouts."""
    from lowrank_tune.algorithms.rollouts import RolloutCollector
    from lowrank_tune.data import PromptExample
    from lowrank_tune.functional import step_seed

    settings = task.settings
    stop_ids = roles.base.end_ids | template.end_ids
    batches = [
        [PromptExample(prompt.ids, prompt.text, prompt.gold, {}) for prompt in prompts]
        for prompts in task.units_of_steps()
    ]

    def next_prompts(step: int, draw: int, count: int | None) -> list[Any]:
        return batches[step]

    def seed_of(number: int) -> int:
        return step_seed(task.seed, number)

    return RolloutCollector(
        roles=roles,
        prompts=next_prompts,
        reward_client=RewardClient(template, stop_ids),
        reward_names=["answer"],
        reward_weights=[1.0],
        decode=template.decode,
        stop_ids=stop_ids,
        pad_id=template.pad_id,
        num_generations=settings.num_generations,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        max_num_seqs=settings.units * settings.num_generations,
        micro_tokens=1 << 15,
        seed_of=seed_of,
    )


def dpo(task: Task, meter: Meter) -> None:
    """DPO over the kit's store of pairs; the log-probs of the reference are computed before the first step."""
    from lowrank_tune.algorithms.base import AlgorithmContext
    from lowrank_tune.algorithms.dpo import DPO
    from lowrank_tune.algorithms.reference_logps import reference_logps
    from lowrank_tune.config import DPOConfig
    from lowrank_tune.data import collate_units
    from lowrank_tune.events import ignore_event

    template, roles = setup.stacked_roles(task)
    meter.tensors = adapter_of(roles)
    settings = task.settings
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(task.units(), Path(folder) / "store")

        def collate(units: Any) -> Any:
            return collate_units(store, units, template.pad_id)

        with meter.counted():
            sums = reference_logps(roles, store, collate, 4096, "tiny", Path(folder), ignore_event)

        def rows(step: int) -> Any:
            start = step * settings.units
            batch = collate(range(start, start + settings.units))
            batch.reference_sequence_logps = sums[2 * start : 2 * (start + settings.units)]
            return batch

        def whole_loss(stats: Mapping[str, float]) -> float:
            return stats["loss"] - settings.sft_coef * stats["logps_per_token/chosen"]

        config = DPOConfig(beta=settings.beta, sft_coef=settings.sft_coef)
        train(task, meter, roles, DPO(AlgorithmContext(roles, rows), config), whole_loss)


def store_of(pairs: list[Pair], folder: Path) -> Any:
    """Returns a store of pairs."""
    from lowrank_tune.batch import Row
    from lowrank_tune.data.store_writer import Entry, StoreWriter

    with StoreWriter(folder, rows_per_unit=2) as writer:
        entries = []
        for place, pair in enumerate(pairs):
            rows = tuple(Row(*row) for row in pair.rows())
            entries.append(Entry(rows, (2 * place, 2 * place + 1)))
        writer.add(entries, 0, [(0, place) for place in range(len(entries))])
        return writer.finish(["units.json"], [])


def adapter_of(roles: Any) -> Any:
    """Returns a function that returns the policy's tensors."""

    def tensors() -> dict[str, Any]:
        return dict(roles.adapter_tensors("policy"))

    return tensors
