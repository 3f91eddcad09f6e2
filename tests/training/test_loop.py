"""The training loop: a broken step changes no weight, a step can be repeated, the schedule equals its formula, and a
lack of progress gives a warning."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from algorithm_helpers import INFORMATIVE_REWARDS, FakeCollector, kto_over, labeled_batch, pair_batch, pair_rows
from models import (
    CPU,
    changed_tensors,
    llama_roles,
    load_base_of,
    perturb,
    ragged_batch,
    relative_error,
    reward_roles,
    same_bytes,
    sft_over,
)
from torch import Tensor, nn

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.grpo import GRPO
from lowrank_tune.algorithms.kto import KTO
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.reward_model import RewardModeling
from lowrank_tune.algorithms.rollouts import RolloutGroups
from lowrank_tune.batch import Batch, LabeledBatch, PairBatch
from lowrank_tune.config import DPOConfig, GRPOConfig, PPOConfig, RewardModelConfig, TrainingConfig
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Event, LogMessage, StepEnd
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats, WeightedMean, add_stats, to_floats
from lowrank_tune.training import trainer as train_module
from lowrank_tune.training.trainer import (
    Trainer,
    TrainerControl,
    TrainerState,
    lr_at_step,
    make_optimizer,
    step_seed,
    update_stats,
)


class Toy(Algorithm[Batch]):
    """An algorithm without a model: a test sets loss and gradient of each step."""

    def __init__(
        self,
        gradients: Mapping[int, list[float]] | None = None,
        losses: Mapping[int, float] | None = None,
        parts: int = 1,
    ) -> None:
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))
        self.gradients, self.losses, self.parts = gradients or {}, losses or {}, parts
        self.step, self.observed, self.collected, self.num_continue_calls = -1, list[int](), list[int](), 0
        self.checks: list[tuple[int, list[float]]] = []
        self.warnings_at: Mapping[int, list[str]] = {}

    def collect(self, step: int) -> StepBatch[Batch]:
        self.step = step
        self.collected.append(step)
        return Several(ragged_batch((3, 5), unscored=()), {"reward": WeightedMean(2.0, 4)}, self.parts)

    def token_weights(self, batch: Batch) -> Tensor:
        return batch.loss_mask.float()

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        gradient = torch.tensor(self.gradients.get(self.step, [0.3, -0.4, 0.0, 0.0])) / 2
        loss = (self.weight * gradient).sum()
        loss = loss - loss.detach() + self.losses.get(self.step, 1.0) / 2
        yield LossTerm(loss, {"loss": WeightedMean(1.0, 2)})

    def step_metrics(self, micro: Batch) -> Stats:
        self.observed.append(self.step)
        return {"kl": WeightedMean(0.0, 1)}

    def eval_metrics(self, micro: Batch) -> Stats:
        return {"loss": WeightedMean(1.0, 1)}

    def check(self, micro: Batch, step: int) -> None:
        self.checks.append((step, self.weight.tolist()))
        # These draws must not change later ones.
        torch.rand(3)

    def diagnostics(self, figures: Mapping[str, float]) -> Iterator[str]:
        yield from self.warnings_at.get(self.step, ())

    def should_continue(self, stats: Stats) -> bool:
        self.num_continue_calls += 1
        return self.num_continue_calls < 3


class Several(StepBatch[Batch]):
    def __init__(self, batch: Batch, stats: Stats, count: int) -> None:
        super().__init__(batch, stats)
        self.count = count

    def minibatches(self) -> Iterator[Batch]:
        for _ in range(self.count):
            yield self.batch


def loop_over(
    algorithm: Any, parameters: list[nn.Parameter], steps: int = 4, optimizer: Any = None, **train: Any
) -> tuple[Trainer, list[Event]]:
    wanted = TrainingConfig(
        **{"learning_rate": 0.1, "lr_scheduler_type": "constant", "micro_batch_size": 1, "logging_steps": 1} | train
    )
    events: list[Event] = []
    optimizer = optimizer or make_optimizer(parameters, wanted, CPU)
    return Trainer(
        algorithm, parameters, optimizer, wanted, steps, 7, CPU, events.append, lambda progress, last: None
    ), events


def toy_loop(toy: Toy, **more: Any) -> tuple[Trainer, list[Event]]:
    return loop_over(toy, [toy.weight], **more)


def warnings_of(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, LogMessage) and event.level == "warning"]


def steps_of(events: list[Event]) -> list[StepEnd]:
    return [event for event in events if isinstance(event, StepEnd)]


# --- a broken step ----------------------------------------------------------------------------------------------------

BREAKS = [
    {"losses": {2: math.nan}},
    {"losses": {2: math.inf}},
    {"gradients": {2: [math.nan, 0, 0, 0]}},
    {"gradients": {2: [0, math.inf, 0, 0]}},
    {"gradients": {2: [1e38, 1e38, 1e38, 1e38]}, "losses": {2: 1.0}},
]


def broken_step_moves(breaks: dict[str, Any]) -> list[str]:
    """What a broken third step changes in parameters, optimizer, counters and events, and should not. Empty is
    right."""
    toy = Toy(**breaks)
    loop, events = toy_loop(toy, weight_decay=0.1)
    kept: dict[int, Any] = {}

    def border(progress: TrainerState, last: bool) -> None:
        kept[progress.step] = (toy.weight.detach().clone(), copy.deepcopy(loop.optimizer.state_dict()["state"]))

    loop.on_step_end = border
    wrong = [] if loop.run() else ["did not run to the end"]
    if not same_bytes(kept[2][0], kept[3][0]):
        wrong.append("parameters")
    if any(not torch.equal(kept[2][1][0][name], kept[3][1][0][name]) for name in kept[2][1][0]):
        wrong.append("optimizer state")
    if same_bytes(kept[3][0], kept[4][0]) or not kept[4][0].isfinite().all():
        wrong.append("the next step")
    if (loop.state.nonfinite_steps, loop.state.consecutive_nonfinite_steps, loop.state.step) != (1, 0, 4):
        wrong.append("counters")
    if len(warnings_of(events)) != 1 or "step 3: loss or gradient is not finite" not in warnings_of(events)[0]:
        wrong.append("warning")
    if [event.stats.get("skipped_steps") for event in steps_of(events)] != [None, None, 1, 1]:
        wrong.append("metric")
    if toy.weight.grad is not None:
        wrong.append("gradient kept")
    return wrong


@pytest.mark.parametrize("breaks", BREAKS, ids=str)
def test_broken_step_changes_no_weight(breaks: dict[str, Any]) -> None:
    if "losses" in breaks and "gradients" in breaks:  # a norm that overflows: the squares of 1e38 are no fp32 number
        assert math.isinf(torch.tensor(1e38).square().item())
    assert broken_step_moves(breaks) == []


@pytest.mark.parametrize("breaks", BREAKS, ids=str)
def test_broken_step_that_is_applied_is_found(monkeypatch: pytest.MonkeyPatch, breaks: dict[str, Any]) -> None:
    monkeypatch.setattr(train_module.math, "isfinite", lambda value: True)
    assert broken_step_moves(breaks) != []


def test_many_broken_steps_end_the_run() -> None:
    toy = Toy(losses=dict.fromkeys((1, 3, 4, 5, 6), math.nan))
    loop, events = toy_loop(toy, steps=20, max_nonfinite_steps=3)
    before = toy.weight.detach().clone()
    with pytest.raises(TrainingError) as caught:
        loop.run()
    assert "3 steps in a row" in str(caught.value) and "step 6" in str(caught.value) and caught.value.exit_code == 1
    assert (
        toy.collected == [0, 1, 2, 3, 4, 5]
        and len(warnings_of(events)) == 4
        and not same_bytes(before, toy.weight.detach())
    )


def test_a_broken_part_ends_the_inner_epochs() -> None:
    toy = Toy(losses={0: math.nan}, parts=3)
    loop, _ = toy_loop(toy, steps=1)
    loop.run()
    assert loop.state.nonfinite_steps == 1 and toy.num_continue_calls == 0


def test_inner_epochs_end_where_the_algorithm_stops_them() -> None:
    toy = Toy(parts=5)
    loop, events = toy_loop(toy, steps=1)
    loop.run()
    assert (
        toy.num_continue_calls == 3
        and steps_of(events)[0].stats["loss"] == 0.5
        and steps_of(events)[0].stats["reward"] == 0.5
    )
    assert int(loop.optimizer.state[toy.weight]["step"]) == 3 and loop.state.tokens == 3 * 8


# --- clipping, schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "factor"), [(10.0, 1.0), (0.25, 0.5), (0.05, 0.1)])
def test_clipping_by_hand(most: float, factor: float) -> None:
    """The gradient is (0.3, -0.4, 0, 0), of norm 0.5; plain SGD shows what is left of it."""
    toy = Toy()
    before = toy.weight.detach().clone()
    loop, events = toy_loop(toy, steps=1, max_grad_norm=most, optimizer=torch.optim.SGD([toy.weight], lr=1.0))
    loop.run()
    assert torch.allclose(before - toy.weight.detach(), 0.1 * factor * torch.tensor([0.3, -0.4, 0.0, 0.0]), atol=1e-6)
    assert steps_of(events)[0].stats["grad_norm"] == pytest.approx(0.5)


ROOT = math.sqrt(0.5)
SCHEDULES = [
    ("constant", 0, 4, [1, 1, 1, 1]),
    ("constant", 3, 5, [0.25, 0.5, 0.75, 1, 1]),
    ("linear", 0, 4, [1, 0.75, 0.5, 0.25]),
    ("linear", 1, 5, [0.5, 1, 0.75, 0.5, 0.25]),
    ("cosine", 0, 4, [1, 0.5 + ROOT / 2, 0.5, 0.5 - ROOT / 2]),
    ("cosine", 2, 6, [1 / 3, 2 / 3, 1, 0.5 + ROOT / 2, 0.5, 0.5 - ROOT / 2]),
    ("cosine", 0, 1, [1]),
    ("linear", 5, 3, [1 / 6, 2 / 6, 3 / 6]),
]


def schedule_error(schedule: str, warmup: int, steps: int, expected: list[float]) -> float:
    """What the optimizer was given at each step, and what was reported, against numbers worked by hand."""
    toy = Toy()
    given: list[float] = []

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            given.append(self.param_groups[0]["lr"])

    loop, events = toy_loop(
        toy, steps=steps, warmup_steps=warmup, lr_scheduler_type=schedule, optimizer=Optimizer([toy.weight], lr=9.0)
    )
    loop.run()
    logged = [event.stats["learning_rate"] for event in steps_of(events)]
    return max(max(abs(a - 0.1 * c), abs(b - 0.1 * c)) for a, b, c in zip(given, logged, expected, strict=True))


@pytest.mark.parametrize(("schedule", "warmup", "steps", "expected"), SCHEDULES)
def test_the_schedule_by_hand(schedule: str, warmup: int, steps: int, expected: list[float]) -> None:
    assert schedule_error(schedule, warmup, steps, expected) < 1e-12


def test_schedule_that_is_one_step_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "lr_at_step", lambda step, *rest: lr_at_step(step + 1, *rest))
    for schedule, warmup, steps, expected in SCHEDULES[1:6]:
        assert schedule_error(schedule, warmup, steps, expected) > 1e-3


def test_adamw_by_hand() -> None:
    """The first AdamW step moves each element by the rate, against its gradient's sign, after the decay."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer([parameter], TrainingConfig(learning_rate=0.1, weight_decay=0.5), CPU)
    parameter.grad = torch.tensor([3.0, -7.0])
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))


# --- events, borders, control -----------------------------------------------------------------------------------------


def test_logging_steps_alone_pay_for_measurements() -> None:
    toy = Toy()
    loop, events = toy_loop(toy, steps=8, logging_steps=3)
    loop.run()
    logged = [event.step for event in steps_of(events) if event.logged]
    assert logged == [1, 3, 6, 8] and toy.observed == [0, 2, 5, 7]
    assert [event.step for event in steps_of(events) if "updated_param_fraction" in event.stats] == logged
    assert [event.step for event in steps_of(events) if "kl" in event.stats] == logged
    assert [event.step for event in steps_of(events)] == list(range(1, 9))
    assert all(
        {"loss", "grad_norm", "learning_rate", "memory_gib", "tokens_per_second"} <= event.stats.keys()
        for event in steps_of(events)
    )
    assert all(event.tokens == 8 and event.steps == 8 for event in steps_of(events)) and loop.state.tokens == 64


def test_on_step_end_comes_after_each_step_and_marks_the_last() -> None:
    toy = Toy()
    loop, events = toy_loop(toy, steps=3)
    calls: list[tuple[int, bool, int]] = []
    loop.on_step_end = lambda progress, last: calls.append((progress.step, last, len(steps_of(events))))
    assert loop.run() is True and calls == [(1, False, 1), (2, False, 2), (3, True, 3)]


def test_stop_ends_after_the_current_step() -> None:
    toy = Toy()
    loop, _ = toy_loop(toy, steps=9)
    calls: list[tuple[int, bool, bool]] = []

    def border(progress: TrainerState, last: bool) -> None:
        calls.append((progress.step, last, loop.control.save))

    real, loop.on_step_end = toy.token_weights, border

    def weigh(batch: Batch) -> Tensor:
        loop.control.stop = toy.step == 1  # in the middle of the second step
        return real(batch)

    toy.token_weights = weigh  # type: ignore[method-assign]
    assert (
        loop.run() is False
        and calls == [(1, False, False), (2, False, False), (2, False, True)]
        and toy.collected == [0, 1]
    )


def test_stop_before_the_first_step_does_nothing() -> None:
    toy = Toy()
    loop, events = toy_loop(toy)
    loop.control.stop = True
    assert loop.run() is False and toy.collected == [] and events == []


def test_a_loop_starts_where_it_stood() -> None:
    toy = Toy()
    loop, events = toy_loop(toy, steps=5)
    loop.state = TrainerState(step=3, nonfinite_steps=2)
    assert loop.run() and toy.collected == [3, 4] and [event.step for event in steps_of(events)] == [4, 5]
    assert loop.state.to_dict() == {
        "step": 5,
        "nonfinite_steps": 2,
        "consecutive_nonfinite_steps": 0,
        "num_stalled_checks": 0,
        "tokens": 16,
    }


@pytest.mark.parametrize("end", ["goes on", "stops"])
def test_pause_waits(end: str) -> None:
    toy = Toy()
    loop, _ = toy_loop(toy, steps=2)
    loop.control = TrainerControl(pause=True)
    thread = threading.Thread(target=loop.run)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive() and toy.collected == []
    if end == "goes on":
        loop.control.pause = False
    else:
        loop.control.stop = True
    thread.join(5)
    assert not thread.is_alive() and toy.collected == ([0, 1] if end == "goes on" else [])


def test_a_paused_loop_still_saves_on_demand() -> None:
    toy, saved = Toy(), []
    loop, _ = toy_loop(toy, steps=2)
    loop.control = TrainerControl(pause=True, save=True)

    def at_border(progress: TrainerState, last: bool) -> None:
        saved.append(progress.step)
        loop.control.save = loop.control.pause = False

    loop.on_step_end = at_border
    assert loop.run() and saved == [0, 1, 2]


# --- the algorithm's own check and worries ----------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 2])
def test_each_start_is_checked_once_before_anything_moves(start: int) -> None:
    toy = Toy()
    initial = toy.weight.tolist()
    loop, _ = toy_loop(toy, steps=4)
    loop.state.step = start
    loop.run()
    assert toy.checks == [(start, initial)]


def test_a_check_that_fails_ends_the_run_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Toy, micro: Batch, step: int) -> None:
        raise TrainingError("the reference is not what it must be")

    monkeypatch.setattr(Toy, "check", refuse)
    toy = Toy()
    before = toy.weight.detach().clone()
    loop, events = toy_loop(toy)
    with pytest.raises(TrainingError, match="reference"):
        loop.run()
    assert same_bytes(before, toy.weight.detach()) and events == [] and not loop.optimizer.state


def drawn_after_the_check(draws: bool) -> list[float]:
    """What the step draws, where the check drew or not."""
    toy, drawn = Toy(), list[float]()

    def weigh(batch: Batch) -> Tensor:
        drawn.append(float(torch.rand(())))
        return batch.loss_mask.float()

    toy.token_weights = weigh  # type: ignore[method-assign]
    if not draws:
        toy.check = lambda micro, step: None  # type: ignore[method-assign]
    toy_loop(toy, steps=2)[0].run()
    return drawn


def test_a_check_leaves_the_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn_after_the_check(True) == drawn_after_the_check(False)
    monkeypatch.setattr(train_module.torch.random, "fork_rng", lambda devices: nullcontext())
    assert drawn_after_the_check(True) != drawn_after_the_check(False)


def test_each_kind_of_warning_is_logged_once() -> None:
    toy = Toy(losses={3: math.nan})
    toy.warnings_at = {
        1: ["it collapses, by 0.6"],
        2: ["it collapses, by 0.7", "it is flat, at 0"],
        3: ["it is broken, now"],
    }
    _, events = done(toy_loop(toy, steps=4))
    assert warnings_of(events)[:2] == ["step 2: it collapses, by 0.6", "step 3: it is flat, at 0"]
    assert not any("broken, now" in message for message in warnings_of(events)), (
        "a step that changed nothing has no figures to worry about"
    )


def done(loop_and_events: tuple[Trainer, list[Event]]) -> tuple[Trainer, list[Event]]:
    loop_and_events[0].run()
    return loop_and_events


def test_every_step_of_grpo_compares_the_sampler_with_its_first_pass() -> None:
    """Three steps of two passes each, at a rate at which the second pass has another policy: what is reported is the
    distance to the policy that drew, which is the drift that the collector adds. A drift that begins in the third step
    ends the run there."""
    roles = llama_roles(16)
    perturb(roles, "policy", size=0.05)
    collector, drifts, added = FakeCollector(roles, INFORMATIVE_REWARDS), (0.0, 0.3, 5.0), list[float]()
    collect = collector.collect

    def drifting(step: int, draw: int, count: int | None = None) -> RolloutGroups:
        collector.drift = drifts[step]
        rollout = collect(step, draw, count)
        apart = (rollout.batch.sampler_logps - collector.logps("policy", rollout.batch)).abs()
        added.append(float(apart[rollout.batch.loss_mask].mean()))
        return rollout

    collector.collect = drifting  # type: ignore[method-assign]
    settings = GRPOConfig(beta=0.0, num_iterations=2, max_logprob_mismatch=0.5)
    algorithm = GRPO(AlgorithmContext(roles, fresh=False), settings, collector)
    loop, events = loop_over(algorithm, roles.parameters("policy"), 3, learning_rate=0.02, micro_batch_size=6)
    with pytest.raises(TrainingError, match="grpo.max_logprob_mismatch"):
        loop.run()
    stats = [event.stats for event in steps_of(events)]
    reported = [each["sampling/sampling_logp_difference/mean"] for each in stats]
    assert len(added) == 3 and reported == pytest.approx(added[:2], abs=1e-5)
    assert all(each["clip_ratio"] > 0 for each in stats), "the second pass has another policy"


# --- a step is drawn again just so ------------------------------------------------------------------------------------


ALGORITHMS = ("sft", "reward", "dpo", "kto", "grpo", "ppo")


def algorithm_over(name: str, dropout: float, **more: Any) -> tuple[Any, Roles, str]:
    """An algorithm over a tiny model with rows of its own for every step, its roles, and the role that it trains."""
    more = {"checkpointing": True} | more
    if name == "sft":
        roles = llama_roles(16, dropout=dropout, **more)
        return sft_over(roles), roles, "policy"
    if name == "reward":
        roles = reward_roles(load_base_of(16), dropout=dropout, **more)
        return RewardModeling(AlgorithmContext(roles, pairs_of), RewardModelConfig()), roles, "reward"
    if name == "ppo":
        roles = llama_roles(
            16,
            extra=["value"],
            trainable=["policy", "value"],
            stacks={"policy": ["policy"], "reference": [], "value": ["value"]},
            heads=["value"],
            **more,
        )
        ppo_settings = PPOConfig(num_ppo_epochs=2, num_mini_batches=2)
        collector = FakeCollector(roles, INFORMATIVE_REWARDS)
        return PPO(AlgorithmContext(roles), ppo_settings, collector), roles, "policy"
    roles = llama_roles(16, **more)  # dropout is a fault there
    if name == "grpo":
        collector = FakeCollector(roles, INFORMATIVE_REWARDS, drift=0.2)
        settings = GRPOConfig(old_logprobs_from="sampler", max_logprob_mismatch=1.0, truncated_completions="penalize")
        return GRPO(AlgorithmContext(roles), settings, collector), roles, "policy"

    if name == "kto":
        return kto_of(roles), roles, "policy"

    def rows(step: int) -> PairBatch:
        batch = pairs_of(step)
        with roles.inference_mode():
            batch.reference_sequence_logps = roles.logps("reference", batch).logps.sum(dim=1)
        return batch

    return DPO(AlgorithmContext(roles, rows), DPOConfig(sft_coef=0.1)), roles, "policy"


def kto_of(roles: Roles) -> KTO:
    def answers(step: int) -> LabeledBatch:
        rows, masks = pair_rows(seed=step)
        batch = labeled_batch(rows, masks, labels=[row % 3 == 0 for row in range(len(rows))])
        with roles.inference_mode():
            batch.reference_sequence_logps = roles.logps("reference", batch).logps.sum(dim=1)
        return batch

    return kto_over(roles, get_batch=answers)


def pairs_of(step: int) -> PairBatch:
    rows, masks = pair_rows(seed=step)
    return pair_batch(rows, masks)


def loop_of(
    name: str = "sft", dropout: float = 0.3, steps: int = 4, **train: Any
) -> tuple[Trainer, Roles, str, list[Event]]:
    algorithm, roles, role = algorithm_over(name, dropout)
    loop, events = loop_over(
        algorithm, roles.parameters(role), steps, **{"learning_rate": 1e-2, "micro_batch_size": 3} | train
    )
    return loop, roles, role, events


def redrawn_step_differs(name: str) -> set[str]:
    """Adapter tensors in which a run that was killed after step 2 and goes on differs from the straight run."""
    straight, roles, role, _ = loop_of(name)
    kept: dict[str, Any] = {}

    def border(progress: TrainerState, last: bool) -> None:
        if progress.step == 2:
            kept.update(tensors=roles.adapter_tensors(role), optimizer=copy.deepcopy(straight.optimizer.state_dict()))

    straight.on_step_end = border
    straight.run()
    again, others, _, _ = loop_of(name)
    # The global stream has another position in a new process.
    torch.rand(5)
    others.load_adapter_tensors(role, kept["tensors"], "here")
    again.optimizer.load_state_dict(kept["optimizer"])
    again.state = TrainerState(step=2)
    again.run()
    return changed_tensors(roles.adapter_tensors(role), others.adapter_tensors(role))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_lost_step_is_drawn_again_bit_for_bit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert redrawn_step_differs(name) == set()
    if name not in ("dpo", "kto", "grpo", "ppo"):  # which draw nothing from the global stream
        monkeypatch.setattr(train_module, "step_seed", lambda seed, step: int(torch.randint(1 << 40, ())))
        assert redrawn_step_differs(name) != set()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_step_without_its_optimizer_state_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    assert redrawn_step_differs(name) != set()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_micro_batch_size_learns_the_same(name: str) -> None:
    """Three whole steps, optimizer and clipping included, with micro-batches of one unit, of two, of a token budget,
    and of all."""
    found = []
    by_tokens = {"micro_batch_size": None, "micro_batch_tokens": 30}
    for split in ({"micro_batch_size": 1}, {"micro_batch_size": 2}, by_tokens, {"micro_batch_size": 50}):
        loop, roles, role, events = loop_of(name, dropout=0.0, steps=3, **split)
        perturb(roles, role, size=0.05)
        loop.algorithm.context = replace(loop.algorithm.context, fresh=False)  # type: ignore[attr-defined]
        # AdamW's first step is a sign, which noise around 0 turns
        loop.optimizer = torch.optim.SGD(loop.parameters, lr=0.0)
        loop.run()
        tensors = torch.cat([tensor.flatten() for tensor in roles.adapter_tensors(role).values()])
        found.append(
            (
                tensors,
                [event.stats["loss"] for event in steps_of(events)],
                [event.stats["grad_norm"] for event in steps_of(events)],
            )
        )
    for tensors, losses, norms in found[1:]:
        assert relative_error(tensors, found[0][0]) < 1e-6
        # A policy loss is the mean of terms around 1 that nearly cancel: fp32 holds those, not their mean, to 1e-6.
        assert losses == pytest.approx(found[0][1], rel=1e-5, abs=1e-6) and norms == pytest.approx(
            found[0][2], rel=1e-5
        )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_loop_learns_and_logs_the_same_metrics_every_step(name: str) -> None:
    """The trained tensors move, nothing else does, and each step has every figure of the algorithm, finite."""
    loop, roles, role, events = loop_of(name, dropout=0.0)
    frozen = {n: p.detach().clone() for n, p in roles.base.model.named_parameters() if not p.requires_grad}
    before = roles.adapter_tensors(role)
    loop.run()
    assert changed_tensors(before, roles.adapter_tensors(role)) == before.keys()
    assert (
        changed_tensors(frozen, {n: p.detach() for n, p in roles.base.model.named_parameters() if not p.requires_grad})
        == set()
    )
    assert len({frozenset(event.stats) for event in steps_of(events)}) == 1
    assert all(math.isfinite(value) for event in steps_of(events) for value in event.stats.values())


def test_seeds_of_steps_differ() -> None:
    seeds = {step_seed(seed, step) for seed in range(40) for step in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert step_seed(2**32 - 1, 10**12) >= 0


# --- is anything learned? ---------------------------------------------------------------------------------------------


def warned_about_learning(rate: float, schedule: str = "constant", name: str = "sft") -> list[str]:
    loop, _, _, events = loop_of(name, dropout=0.0, steps=8, learning_rate=rate, lr_scheduler_type=schedule)
    loop.run()
    return [message for message in warnings_of(events) if "nothing is being learned" in message]


@pytest.mark.parametrize(
    "name", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS if name != "sft")]
)
def test_a_learning_rate_too_low_to_learn_gives_one_warning(name: str) -> None:
    assert len(warned_about_learning(1e-30, name=name)) == 1
    assert len(warned_about_learning(1e-12, name=name)) == 1
    assert warned_about_learning(1e-3, name=name) == []


@pytest.mark.slow
def test_a_learning_rate_that_learns_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate, schedule in ((1e-2, "constant"), (1e-6, "constant"), (2e-4, "cosine")):
        assert warned_about_learning(rate, schedule) == []
    monkeypatch.setattr(train_module, "MIN_UPDATE_RATIO", 0.0)
    # The share alone is not enough: B starts at 0 and changes at any rate.
    assert warned_about_learning(1e-30) == []


def test_the_end_of_a_schedule_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> list[str]:
        toy = Toy()
        loop, events = toy_loop(toy, steps=10**6, lr_scheduler_type="cosine", learning_rate=1e-4)
        loop.state.step = 10**6 - 6
        loop.run()
        return warnings_of(events)

    assert end() == []
    monkeypatch.setattr(train_module, "MIN_LR_FRACTION", 0.0)
    assert len(end()) == 1


def test_movement_by_hand() -> None:
    parameters = [nn.Parameter(torch.tensor([3.0, 0.0])), nn.Parameter(torch.tensor([[1.0, 1.5], [4.0, 0.0]]))]
    before = [torch.tensor([0.0, 0.0]), torch.tensor([[1.0, 1.5], [0.0, 0.0]])]
    stats = to_floats(update_stats(parameters, before))
    assert stats["updated_param_fraction"] == pytest.approx(2 / 6)
    assert stats["update_ratio"] == pytest.approx(5 / math.sqrt(1 + 2.25))


def test_means_add_over_micro_batches() -> None:
    stats: Stats = {"a": WeightedMean(torch.tensor(6.0), 3)}
    add_stats(stats, {"a": WeightedMean(2.0, torch.tensor(1)), "b": WeightedMean(1, 0)})
    assert to_floats(stats)["a"] == 2.0 and math.isnan(to_floats(stats)["b"]) and to_floats({}) == {}
