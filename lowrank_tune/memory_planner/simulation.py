"""The recipe's real phases, rehearsed: its own roles, algorithm, loop and sampler on a base of a few layers without
numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.rollouts import RolloutCollector, RolloutGroups
from lowrank_tune.assembly import ONLINE_ALGORITHMS, make_algorithm
from lowrank_tune.assembly.reward_model import REWARD_ROLE, score_rows
from lowrank_tune.assembly.stacks import ROLES_WITH_HEAD, build_stacks
from lowrank_tune.batch import Batch, PairBatch, RolloutBatch
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import PromptExample
from lowrank_tune.memory_planner.allocation_tracker import AllocationTracker
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.fake_device import FakeDeviceMode, fake_device_mode
from lowrank_tune.memory_planner.meta_model import Layer, meta_base, stored_tensors, with_few_layers
from lowrank_tune.memory_planner.optimizers import planned_optimizer
from lowrank_tune.memory_planner.plan_report import PHASE_SEPARATOR
from lowrank_tune.memory_planner.rollouts import DecodingSpec, decode
from lowrank_tune.memory_planner.sizes import Sizes, batch_of
from lowrank_tune.model import logprobs
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats
from lowrank_tune.training.trainer import Trainer, TrainerState


@dataclass(frozen=True)
class SimulationSpec:
    """All that is rehearsed but for depth. `loaded` are the shapes of adapters that come from files,
    `reward_base_adapters` what lies under a reward model that is not trained; `rollouts` by name of their phase."""

    recipe: RecipeConfig
    config: Any
    device: torch.device
    sizes: Sizes
    loaded: Mapping[str, LoraConfig] = field(default_factory=dict)
    reward_base_adapters: Sequence[str] = ()
    rollouts: Mapping[str, DecodingSpec] = field(default_factory=dict)


def simulate(spec: SimulationSpec, layers: Sequence[Layer], only_update: bool = False) -> Peaks:
    """Runs every phase once, or the update alone, or where the scene has rollouts these alone, on a base of these
    layers; what was alive when."""
    recipe = spec.recipe
    tracker = AllocationTracker(spec.device.type, spec.config.get_text_config().vocab_size)
    with (
        warnings.catch_warnings(),
        tracker,
        fake_device_mode(spec.device) as mode,
        patch.object(logprobs, "_chunk_logps", _skip_repeated_chunks(logprobs._chunk_logps)),
    ):
        warnings.simplefilter("ignore")
        stage = _SimulatedStage(spec, layers, tracker, mode)
        if spec.rollouts:
            stage.run_decoding()
        elif recipe.algorithm in ONLINE_ALGORITHMS:
            stage.online(only_update)
        else:
            stage.simulate_offline(only_update)
    return {point: peak for point, peak in tracker.peaks.items() if point[0] != "start"}


def _skip_repeated_chunks(one_chunk: Callable[..., None]) -> Callable[..., None]:
    """The output head's chunks are alike: after the second each finds the same memory as the one before, until the
    last, which may be short."""

    def first_and_last(
        head: Any,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        into: Tensor,
        *more: Any,
    ) -> None:
        begins = into.storage_offset()
        whole = into.untyped_storage().nbytes() // into.element_size()
        if begins <= len(into) or begins + len(into) == whole:
            one_chunk(head, hidden, targets, temperature, into, *more)

    return first_and_last


class _SimulatedStage:
    """One algorithm over a shallow base, ready to run its phases."""

    def __init__(
        self,
        spec: SimulationSpec,
        layers: Sequence[Layer],
        tracker: AllocationTracker,
        mode: FakeDeviceMode,
    ) -> None:
        self.spec = spec
        self.recipe = spec.recipe
        self.sizes = spec.sizes
        self.tracker = tracker
        base = meta_base(
            with_few_layers(spec.config, layers),
            self.recipe.base.model,
            self.recipe.base.bits,
            spec.device,
        )
        configs, stacks = build_stacks(self.recipe, base.model, spec.loaded, spec.reward_base_adapters)
        _hook_layers(base.model, tracker, mode)
        with torch.device("meta"):
            self.roles = Roles(
                base,
                configs,
                [self.recipe.trained_adapter, *self.recipe.extra_adapters],
                stacks,
                sum(layer.recomputed for layer in layers),
                0,
                ROLES_WITH_HEAD & stacks.keys(),
                self.recipe.train.activation_offloading,
            )
        tracker.set_purpose(stored_tensors(base.model), "weights")
        tracker.set_purpose((p for name, p in base.model.named_parameters() if "lora_" in name), "adapters")
        tracker.set_purpose((head.weight for head in self.roles.heads.values()), "adapters")
        self.trained = (self.recipe.trained_adapter, *self.recipe.extra_adapters)
        named = [self.roles.parameters(role) for role in self.trained]
        self.parameters: list[nn.Parameter] = [parameter for role_parameters in named for parameter in role_parameters]
        self.optimizer: Any = None
        self.context = AlgorithmContext(self.roles, lambda step: self._batch(self.sizes.rows))

    def _batch(self, rows: int) -> Batch:
        batch = batch_of(rows, self.sizes)
        if self.recipe.algorithm == "dpo":
            assert isinstance(batch, PairBatch), "dpo trains on pairs"
            batch.reference_sequence_logps = torch.zeros(rows)
        return batch

    def run_decoding(self) -> None:
        """Completions of training, and answers to held-out questions. The optimizer's moments lie there meanwhile."""
        self._create_optimizer()
        for phase, decoding in self.spec.rollouts.items():
            decode(
                self.roles,
                decoding,
                self.tracker.with_purpose("KV cache"),
                partial(_start_pass, self.tracker, phase),
            )

    def _create_optimizer(self) -> None:
        """As from the second step on: the optimizer's moments are there."""
        self.tracker.move_to("start")
        with self.tracker.with_purpose("optimizer"):
            self.optimizer = planned_optimizer(self.parameters, self.recipe.train, self.spec.device)

    def simulate_offline(self, only_update: bool) -> None:
        algorithm = make_algorithm(self.recipe, self.context)
        if self.recipe.algorithm == "dpo" and not only_update:
            self.tracker.move_to("reference", "before")
            with self.roles.inference_mode():
                self.roles.logps(
                    "reference", self._batch(self.sizes.no_grad_rows()).to(self.roles.base.device)
                ).logps.sum(dim=1).cpu()
        self._create_optimizer()
        if not only_update:
            self.tracker.move_to("first check", "before")
            micro = self._batch(self.sizes.rows).to(self.roles.base.device)
            algorithm.check(micro, 0)
            self.tracker.move_to("validation", "before")
            with self.roles.inference_mode():
                algorithm.eval_metrics(self._batch(self.sizes.no_grad_rows()).to(self.roles.base.device))
        self._loop(algorithm, algorithm.collect(0), not only_update)

    def online(self, only_update: bool) -> None:
        rollout = self.recipe.rollout
        sizes = self.sizes
        if only_update:
            sizes = replace(sizes, num_rollouts=-(-sizes.rows // sizes.group) * sizes.group)
        collector = _FakeRolloutCollector(
            roles=self.roles,
            prompts=_no_prompts,
            reward_client=_NullRewards(),
            reward_names=["reward"],
            reward_weights=[1.0],
            decode=str,
            stop_ids=frozenset(),
            pad_id=0,
            num_generations=rollout.num_generations,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            max_num_seqs=1,
            micro_tokens=self.sizes.no_grad_tokens,
            seed_of=lambda number: 0,
            sizes=sizes,
            skip_logps=only_update,
        )
        algorithm = make_algorithm(self.recipe, self.context, collector)
        if only_update and isinstance(algorithm, PPO):
            algorithm._values = _no_values  # type: ignore[method-assign]
        self._create_optimizer()
        if not only_update and REWARD_ROLE in self.roles.heads and REWARD_ROLE not in self.trained:
            self.tracker.move_to("reward model", "before")
            score_rows(self.roles, [[0] * self.sizes.length] * self.sizes.no_grad_rows(), 0, self.sizes.no_grad_tokens)
        self.tracker.move_to("old and reference", "before")
        experience = algorithm.collect(0)
        if not only_update:
            self.tracker.move_to("first check", "before")
            algorithm.check(experience.batch.select_rows(torch.arange(self.sizes.rows)).to(self.roles.base.device), 0)
        self._loop(algorithm, experience, not only_update)

    def _loop(self, algorithm: Algorithm[Any], experience: StepBatch[Any], logged: bool) -> None:
        """One step of the real loop, of one micro-batch."""
        train = self.recipe.train.model_copy(
            update={
                "micro_batch_size": self.sizes.units,
                "micro_batch_tokens": None,
                "logging_steps": 1,
                "max_nonfinite_steps": 1,
            }
        )
        passes = {
            "grpo": self.recipe.grpo.num_iterations,
            "ppo": self.recipe.ppo.num_ppo_epochs * self.recipe.ppo.num_mini_batches,
        }.get(self.recipe.algorithm, 1)
        single_batch = _SingleBatchAlgorithm(
            algorithm,
            experience,
            self.sizes,
            self.tracker,
            logged,
            self.parameters,
            passes,
        )
        self.optimizer.register_step_pre_hook(lambda *_: self.tracker.move_to("optimizer", "before"))
        loop = Trainer(
            single_batch,
            self.parameters,
            self.optimizer,
            train,
            1,
            0,
            self.spec.device,
            lambda event: None,
            _noop_step_end,
            checked=True,
        )
        loop.run()


@dataclass
class _RepeatedBatch(StepBatch[Batch]):
    """Where a rollout batch is passed over several times, the second time stands for all further ones."""

    count: int = 1

    def minibatches(self) -> Iterator[Batch]:
        for _ in range(min(2, self.count)):
            yield self.batch


@dataclass
class _SingleBatchAlgorithm(Algorithm[Batch]):
    """An algorithm of one micro-batch, whose phases are told apart."""

    algorithm: Algorithm[Any]
    experience: StepBatch[Any]
    sizes: Sizes
    tracker: AllocationTracker
    logged: bool
    parameters: Sequence[nn.Parameter]
    num_passes: int

    def __post_init__(self) -> None:
        self.rows_per_unit = self.algorithm.rows_per_unit

    def collect(self, step: int) -> StepBatch[Batch]:
        batch = self.experience.batch
        return _RepeatedBatch(
            batch if len(batch) <= self.sizes.rows else batch.select_rows(torch.arange(self.sizes.rows)),
            count=self.num_passes,
        )

    def token_weights(self, batch: Batch) -> Tensor:
        self.tracker.move_to("update", "before")
        for parameter in self.parameters:  # as from the second micro-batch on
            parameter.grad = torch.zeros_like(parameter)
        self.tracker.set_purpose((parameter.grad for parameter in self.parameters), "gradients")
        return self.algorithm.token_weights(batch)

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        terms = self.algorithm.compute_losses(micro)
        for number in range(9):
            self.tracker.move_to(UPDATE_PHASES[number] if isinstance(self.algorithm, PPO) else "update", "before")
            term = next(terms, None)
            if term is None:
                return
            self.tracker.move_to(self.tracker.point[0], "after")
            yield term

    def step_metrics(self, micro: Batch) -> Stats:
        if not self.logged:
            return {}
        self.tracker.move_to("measuring KL", "before")
        return self.algorithm.step_metrics(micro)


UPDATE_PHASES = ("update", "update of the value", *["end"] * 7)


class _FakeRolloutCollector(RolloutCollector):
    """Completions that nobody drew, of the sizes that are planned for. With `skip_logps` nothing goes
    through the model."""

    def __init__(self, *, sizes: Sizes, skip_logps: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.sizes = sizes
        self.skip_logps = skip_logps

    def logps(self, role: str, batch: RolloutBatch) -> Tensor:
        if self.skip_logps:
            return torch.zeros(batch.input_ids.shape)
        return super().logps(role, batch)

    def collect(self, step: int, draw: int, count: int | None = None) -> RolloutGroups:
        rows = self.sizes.num_rollouts
        n = self.num_generations
        batch = batch_of(rows, self.sizes)
        rewards = (torch.arange(rows) % 2).double().view(-1, n)
        return RolloutGroups(
            batch=RolloutBatch(**batch.tensors(), sampler_logps=torch.zeros(batch.input_ids.shape)),
            rewards=rewards,
            reward_components=rewards.view(-1, 1),
            truncated=torch.zeros(rows, dtype=torch.bool),
            reward_names=self.reward_names,
            texts=[""] * rows,
            prompts=[],
        )


def _hook_layers(model: Any, tracker: AllocationTracker, mode: FakeDeviceMode) -> None:
    """Tells the ledger which layer runs, forward and backward; and has its parts run under the mode where they are
    computed again."""
    layers = next(one for one in model.get_decoder().modules() if isinstance(one, nn.ModuleList))
    last = len(layers) - 1
    for number, layer in enumerate(layers):
        if number == 0:
            layer_position = "first"
        elif number == last:
            layer_position = "last"
        else:
            layer_position = "between"

        def before(layer_position: str = layer_position) -> None:
            tracker.move_to(
                tracker.point[0],
                "forward" if torch._C._current_graph_task_id() == -1 else "backward",
                layer_position,
            )

        def after(
            module: Any,
            given: Any,
            out: Any,
            layer_position: str = layer_position,
            ends: bool = number == last,
        ) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: tracker.move_to(tracker.point[0], "backward", layer_position))
            if ends:
                tracker.move_to(tracker.point[0], "after")

        for child in layer.children():
            mode.with_recompute(child, before)
        layer.register_forward_hook(after)


def _start_pass(tracker: AllocationTracker, phase: str, pass_name: str) -> None:
    tracker.move_to(f"{phase}{PHASE_SEPARATOR}{pass_name}", "before")


def _no_prompts(step: int, draw: int, count: int | None) -> list[PromptExample]:
    raise AssertionError("nobody asks")


def _no_values(batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch.input_ids.shape), torch.zeros(len(batch))


class _NullRewards:
    def submit(self, *_: Any) -> None: ...
    def collect(self) -> dict[int, Any]:
        return {}


def _noop_step_end(state: TrainerState, last: bool) -> None: ...
