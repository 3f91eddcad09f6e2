"""Loss scaling of float16: the scales and steps of torch, overflows that change nothing and are reported, and a resumed
run that continues with its scale."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CPU, changed_tensors, ragged_batch, same_bytes
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_tune
from lowrank_tune.algorithms.base import Algorithm, LossTerm, StepBatch
from lowrank_tune.batch import Batch
from lowrank_tune.config import TrainingConfig, load_any
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Event, LogMessage, StepEnd
from lowrank_tune.model.optimizers import make_optimizer
from lowrank_tune.stats import Stats, WeightedMean
from lowrank_tune.training import loss_scaling
from lowrank_tune.training.loss_scaling import INITIAL_SCALE, LossScaler
from lowrank_tune.training.trainer import Trainer

START = [1.0, -2.0, 3.0, 0.5]
STEPS = 12
LARGE = {1: 40.0, 2: 3.0, 7: 9.0}
"""Gradients of single steps: times the first scales they exceed 65,504."""


class HalfAlgorithm(Algorithm[Batch]):
    """A loss whose gradient passes through float16."""

    def __init__(self, gradients: Mapping[int, float], losses: Mapping[int, float] | None = None) -> None:
        self.weight = nn.Parameter(torch.tensor(START))
        self.gradients, self.losses = gradients, losses or {}
        self.step = 0

    def collect(self, step: int) -> StepBatch[Batch]:
        self.step = step
        return StepBatch(ragged_batch((3, 5), unscored=()))

    def token_weights(self, batch: Batch) -> Tensor:
        return batch.loss_mask.float()

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        value = half_loss(self.weight, self.gradients.get(self.step, 0.3))
        loss = value - value.detach() + self.losses.get(self.step, 1.0)
        yield LossTerm(loss, {"loss": WeightedMean(1.0, 2)})

    def step_metrics(self, micro: Batch) -> Stats:
        return {}

    def eval_metrics(self, micro: Batch) -> Stats:
        return {}

    def check(self, micro: Batch, step: int) -> None:
        return


def half_loss(weight: Tensor, gradient: float) -> Tensor:
    """Returns a loss whose gradient is half of these numbers."""
    return (weight.half() * torch.tensor([gradient, -gradient, 0.0, 0.0]).half()).float().sum() / 2


def trainer_of(algorithm: HalfAlgorithm, **train: Any) -> tuple[Trainer, list[Event]]:
    config = TrainingConfig(
        **{"learning_rate": 0.1, "lr_scheduler_type": "constant", "micro_batch_size": 2, "logging_steps": 1} | train
    )
    events: list[Event] = []
    parameters = [algorithm.weight]
    trainer = Trainer(
        algorithm,
        parameters,
        make_optimizer(parameters, config, CPU),
        config,
        STEPS,
        7,
        CPU,
        events.append,
        lambda progress, last: None,
        loss_scaler=LossScaler("cpu", enabled=True),
    )
    return trainer, events


def metrics_of(events: list[Event], name: str) -> list[float]:
    return [event.stats[name] for event in events if isinstance(event, StepEnd)]


def messages_of(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, LogMessage)]


def test_scales_and_weights_are_those_of_the_loop_in_the_documentation_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", 3)
    algorithm = HalfAlgorithm(LARGE)
    trainer, events = trainer_of(algorithm)
    trainer.run()

    weight = nn.Parameter(torch.tensor(START))
    optimizer = make_optimizer([weight], trainer.train, CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=3)
    scales = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = trainer.train.learning_rate
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(half_loss(weight, LARGE.get(step, 0.3))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([weight], trainer.train.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert same_bytes(algorithm.weight.detach(), weight.detach())
    assert metrics_of(events, "loss_scale") == scales
    assert min(scales) < INITIAL_SCALE and scales != sorted(scales, reverse=True)


def test_an_overflow_changes_nothing_and_is_counted() -> None:
    algorithm = HalfAlgorithm({2: 40.0})
    trainer, events = trainer_of(algorithm)
    weights: list[Tensor] = []
    trainer.on_step_end = lambda progress, last: weights.append(algorithm.weight.detach().clone())
    assert trainer.run()
    changed = [not same_bytes(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == [step != 2 for step in range(1, STEPS)]
    assert metrics_of(events, "overflowed_steps") == [0.0] * 2 + [1.0] * (STEPS - 2)
    assert "step 3: a gradient exceeded float16; this update changes nothing, and the loss scale is now 32,768" in (
        messages_of(events)
    )
    assert trainer.state.nonfinite_steps == 0


@pytest.mark.parametrize("spoils_gradient", [False, True])
def test_a_loss_that_is_not_finite_keeps_the_scale(spoils_gradient: bool) -> None:
    algorithm = HalfAlgorithm({3: math.nan} if spoils_gradient else {}, {3: math.nan})
    trainer, events = trainer_of(algorithm)
    trainer.run()
    assert trainer.state.nonfinite_steps == 1 and trainer.loss_scaler.num_overflows == 0
    assert set(metrics_of(events, "loss_scale")) == {INITIAL_SCALE}


def test_a_step_without_a_gradient_changes_nothing() -> None:
    algorithm = HalfAlgorithm({})
    algorithm.weight.requires_grad_(False)
    scaler = LossScaler("cpu", enabled=True)
    scaler.unscale(torch.optim.SGD([algorithm.weight], lr=1.0))
    assert not scaler.update(1.0, 0.0)


@pytest.mark.parametrize("enabled", [False, True])
def test_each_minibatch_of_a_step_has_its_own_gradient(enabled: bool) -> None:
    """Not the sum with those of the minibatches before it."""
    algorithm = HalfAlgorithm({})
    trainer, _ = trainer_of(algorithm)
    trainer.loss_scaler = LossScaler("cpu", enabled=enabled)
    trainer.steps = 1
    batch = StepBatch(ragged_batch((3, 5), unscored=()))
    gradients: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(algorithm.weight.grad.clone()))  # type: ignore[union-attr]
    trainer._update(iter([batch.batch] * 3), {}, is_logged=False)
    expected = torch.tensor([0.15, -0.15, 0.0, 0.0])
    assert len(gradients) == 3
    for gradient in gradients:
        assert torch.allclose(gradient, expected, atol=1e-4)


def test_a_gradient_that_is_never_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the scale is halved down to 1, then the steps count as broken."""
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 4.0)
    algorithm = HalfAlgorithm({})
    algorithm.weight.register_hook(torch.Tensor.log)
    trainer, _ = trainer_of(algorithm, max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.run()
    assert trainer.loss_scaler.num_overflows == 2 and trainer.state.nonfinite_steps == 3


def test_without_loss_scaling_nothing_is_scaled() -> None:
    scaler = LossScaler()
    loss = torch.tensor(2.0)
    assert not scaler.enabled and scaler.scaled(loss) is loss and scaler.scale == 1.0
    assert not scaler.update(1.0, math.inf)


def test_the_state_is_that_of_the_checkpoint() -> None:
    trainer, _ = trainer_of(HalfAlgorithm(LARGE))
    trainer.run()
    restored = LossScaler("cpu", enabled=True)
    restored.restore(trainer.loss_scaler.state())
    assert restored.state() == trainer.loss_scaler.state() and restored.num_overflows == 2
    assert restored.scale == trainer.loss_scaler.scale < INITIAL_SCALE


@pytest.mark.slow
def test_a_resumed_run_in_float16_has_the_bits_of_an_undisturbed_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a scale at which the first steps overflow."""
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 2.0**23)

    recipe = load_any(
        "tiny-sft",
        "base.dtype=float16",
        "train.max_steps=6",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.save_steps=1",
        "evaluate={}",
    )
    events: list[Event] = []

    def stop(event: Event) -> None:
        if isinstance(event, StepEnd) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def run(name: str, on_event: Callable[[Event], None]) -> Path:
        lowrank_tune.run(recipe, out=tmp_path / name, ui="none", device=CPU, on_event=on_event)
        return tmp_path / name / "final" / "adapter_model.safetensors"

    straight = load_file(run("straight", events.append))
    assert metrics_of(events, "overflowed_steps")[-1] > 0
    assert not run("resumed", stop).exists()
    assert not changed_tensors(straight, load_file(run("resumed", events.append)))
    assert metrics_of(events, "loss_scale")[-1] == metrics_of(events, "loss_scale")[5]
