"""Simulates the phases of a recipe: its own roles, algorithm, loop and sampler run on a base of a few layers without
data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext, LossTerm, StepBatch
from lowrank_tune.algorithms.kl_estimate import rows_of_batch
from lowrank_tune.algorithms.kto import KTO
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.algorithms.rollouts import RolloutCollector, RolloutGroups
from lowrank_tune.assembly import make_algorithm
from lowrank_tune.assembly.model import add_router_loss, logits_chunk_of
from lowrank_tune.assembly.reward_model import REWARD_ROLE, score_rows
from lowrank_tune.assembly.stacks import ROLES_WITH_HEAD, build_stacks
from lowrank_tune.batch import Batch, LabeledBatch, PairBatch, RolloutBatch
from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import PromptExample
from lowrank_tune.events import ignore_event
from lowrank_tune.memory_planner.allocation_tracker import AllocationTracker
from lowrank_tune.memory_planner.compiled_layers import LayerPrograms, SimulatedCompiledLayers
from lowrank_tune.memory_planner.extrapolation import Peaks
from lowrank_tune.memory_planner.fake_device import FakeDeviceMode, fake_device_mode, replaced
from lowrank_tune.memory_planner.kernel_counter import KernelCounter, KernelCounts
from lowrank_tune.memory_planner.meta_model import Layer, meta_base, shared_keys_of, stored_tensors, with_few_layers
from lowrank_tune.memory_planner.optimizers import planned_optimizer
from lowrank_tune.memory_planner.plain_steps import plain_steps
from lowrank_tune.memory_planner.plan_report import KL_ESTIMATE, PHASE_SEPARATOR
from lowrank_tune.memory_planner.rollouts import Decoding, DecodingSpec, decode, decode_typical_steps
from lowrank_tune.memory_planner.sizes import Sizes, batch_of
from lowrank_tune.memory_planner.skipped_chunks import skip_middle_chunks
from lowrank_tune.model import chunked_forward, logprobs
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import Stats
from lowrank_tune.training.trainer import Trainer, TrainerState


@dataclass(frozen=True)
class SimulationSpec:
    """What is simulated, except for the number of layers. `loaded` are the configurations of adapters that come from
    files, `reward_base_adapters` the adapters below a reward model that is not trained, `rollouts` the phases that
    decode, by name."""

    recipe: RecipeConfig
    config: Any
    device: torch.device
    sizes: Sizes
    loaded: Mapping[str, LoraConfig] = field(default_factory=dict)
    reward_base_adapters: Sequence[str] = ()
    rollouts: Mapping[str, DecodingSpec] = field(default_factory=dict)
    compiled: bool = False
    """Whether layers run as `torch.compile` compiles them, where a gradient is needed."""
    programs: LayerPrograms = field(default_factory=LayerPrograms, compare=False, repr=False)
    """Traced layers of earlier simulations. A copy with other sizes shares them; its base, adapters and device must be
    the same."""


def simulate(
    spec: SimulationSpec,
    layers: Sequence[Layer],
    only_update: bool = False,
) -> Peaks:
    """Runs every phase once on a base of these layers; only the update if `only_update`, only the rollouts if the spec
    has any. Returns the bytes by purpose at the peak of each program point."""
    tracker = _make_tracker(spec)
    _run(
        spec,
        layers,
        only_update,
        tracker,
    )
    return {point: peak for point, peak in tracker.peaks.items() if point[0] != "start"}


def count_kernels(
    spec: SimulationSpec,
    layers: Sequence[Layer],
    only_update: bool = False,
) -> KernelCounts:
    """Runs what `simulate` runs, except that decoding makes the steps of `rollouts.decode_typical_steps`. Returns how
    often each kernel is started, by phase."""
    tracker = _make_tracker(spec)
    counter = KernelCounter(tracker)
    _run(
        spec,
        layers,
        only_update,
        tracker,
        counter,
    )
    return counter.counts


def _make_tracker(spec: SimulationSpec) -> AllocationTracker:
    return AllocationTracker(spec.device.type, spec.config.get_text_config().vocab_size)


def _run(
    spec: SimulationSpec,
    layers: Sequence[Layer],
    only_update: bool,
    tracker: AllocationTracker,
    counter: KernelCounter | None = None,
) -> None:
    with (
        warnings.catch_warnings(),
        tracker,
        counter or nullcontext(),
        nullcontext() if counter is None else plain_steps(),
        fake_device_mode(spec.device) as mode,
        replaced(logprobs, "chunk_logps", _skip_repeated_chunks(logprobs.chunk_logps, counter)),
        replaced(chunked_forward, "run_chunk", skip_middle_chunks(chunked_forward.run_chunk, mode, counter)),
    ):
        warnings.simplefilter("ignore")
        stage = _SimulatedStage(
            spec,
            layers,
            tracker,
            mode,
            counter,
        )
        if spec.rollouts:
            stage.run_decoding(decode if counter is None else decode_typical_steps)
        elif spec.recipe.is_online:
            stage.run_online(only_update)
        else:
            stage.run_offline(only_update)


def _skip_repeated_chunks(one_chunk: Callable[..., None], counter: KernelCounter | None = None) -> Callable[..., None]:
    """Returns `one_chunk` for the first two chunks of the output head and the last, which may be shorter. The others
    use the same memory as the second, and its kernels are counted for them."""

    def first_and_last(
        head: Any,
        hidden: Tensor,
        targets: Tensor,
        temperature: float,
        logps: Tensor,
        *others: Any,
    ) -> None:
        start = logps.storage_offset()
        total = logps.untyped_storage().nbytes() // logps.element_size()
        if start <= len(logps) or start + len(logps) == total:
            is_second = 0 < start == len(logps)
            times = max(1, -(-total // len(logps)) - 2) if is_second else 1
            with nullcontext() if counter is None else counter.repeated(times):
                one_chunk(
                    head,
                    hidden,
                    targets,
                    temperature,
                    logps,
                    *others,
                )

    return first_and_last


class _SimulatedStage:
    """One algorithm over a base of a few layers."""

    def __init__(
        self,
        spec: SimulationSpec,
        layers: Sequence[Layer],
        tracker: AllocationTracker,
        mode: FakeDeviceMode,
        counter: KernelCounter | None = None,
    ) -> None:
        self.spec = spec
        self.recipe = spec.recipe
        self.sizes = spec.sizes
        self.tracker = tracker
        recipe = spec.recipe
        few_layers = with_few_layers(spec.config, layers)
        with shared_keys_of(spec.config, layers):
            base = meta_base(few_layers, recipe.base, spec.device)
        configs, stacks = build_stacks(
            recipe,
            base.model,
            spec.loaded,
            spec.reward_base_adapters,
        )
        before_layers = _hook_layers(base.model, tracker, mode)
        self.trained = (recipe.trained_adapter, *recipe.extra_adapters)
        with torch.device("meta"):
            self.roles = Roles(
                base,
                configs,
                self.trained,
                stacks,
                checkpointing=sum(layer.recomputed for layer in layers),
                heads=ROLES_WITH_HEAD & stacks.keys(),
                offload=recipe.train.activation_offloading,
                mlp_chunks=recipe.train.mlp_chunks,
                logits_chunk=logits_chunk_of(recipe),
            )
        _hook_linears(before_layers, mode)
        tracker.set_purpose(stored_tensors(base.model), "weights")
        tracker.set_purpose((p for name, p in base.model.named_parameters() if "lora_" in name), "adapters")
        tracker.set_purpose((head.weight for head in self.roles.heads.values()), "adapters")
        self.parameters: list[nn.Parameter] = []
        for role in self.trained:
            self.parameters += self.roles.parameters(role)
        self.optimizer: Any = None
        self.context = AlgorithmContext(self.roles, self._step_batch)
        self._choose_paths()
        if spec.compiled:
            compiled = SimulatedCompiledLayers(spec.programs, mode, counter, self._active_stack)
            self._compile(layers, before_layers, compiled)

    def _choose_paths(self) -> None:
        """Makes the decoder run on the paths that are planned, with the loss of the routers."""
        # Plans are for rows that are padded to one length, because the lengths of a micro-batch are not known before.
        self.roles.decoder.packed_rows.enabled = False
        # Compared once in a run, before its first step: not a part of any phase.
        _ = self.roles.decoder.runs_without_masks
        if self.recipe.algorithm != "sft":
            _ = self.roles.decoder.max_shareable_length
        self.roles.verified = True
        # Of MLPs in chunks some are skipped, and so are their routers.
        if self.recipe.train.mlp_chunks == 1:
            add_router_loss(self.recipe, self.roles)

    def _compile(
        self,
        kinds: Sequence[Layer],
        before_layers: Mapping[nn.Module, Callable[[], None]],
        compiled: SimulatedCompiledLayers,
    ) -> None:
        """Makes the layers run as compiled ones. Layers that use the keys and values of another one run as they are:
        the program of a layer does not pass them on."""
        if not all(layer.has_keys for layer in kinds):
            self.spec.programs.add_fault("some layers use the keys and values of another one")
            return
        for kind, (layer, before_layer) in zip(kinds, before_layers.items(), strict=True):
            if isinstance(layer, GradientCheckpointingLayer):
                compiled.install(layer, kind.kind, before_layer)
        self.roles.decoder.layers_context = compiled.running

    def _active_stack(self) -> list[str]:
        return self.roles.active_stack

    def _batch(self, rows: int) -> Batch:
        batch = batch_of(rows, self.sizes)
        if self.recipe.algorithm == "dpo":
            assert isinstance(batch, PairBatch), "dpo trains on pairs"
            batch.reference_sequence_logps = torch.zeros(rows)
        if self.recipe.algorithm == "kto":
            assert isinstance(batch, LabeledBatch), "kto trains on answers with a label"
            batch.reference_sequence_logps = torch.zeros(rows)
            batch.kl_estimate = torch.zeros(rows)
        return batch

    def _step_batch(self, step: int) -> Batch:
        return self._batch(self.sizes.rows)

    def _device_batch(self, rows: int) -> Batch:
        return self._batch(rows).to(self.roles.base.device)

    def run_decoding(self, run: Decoding) -> None:
        """Completions of training, and answers to held-out questions. The optimizer's moments exist meanwhile."""
        self._create_optimizer()
        for phase, decoding in self.spec.rollouts.items():
            run(
                self.roles,
                decoding,
                replaced(self.tracker, "purpose", "KV cache"),
                partial(_start_pass, self.tracker, phase),
            )

    def _create_optimizer(self) -> None:
        """The optimizer as from the second step on, with its moments."""
        self.tracker.move_to("start")
        with replaced(self.tracker, "purpose", "optimizer"):
            self.optimizer = planned_optimizer(self.parameters, self.recipe.train, self.spec.device)

    def run_offline(self, only_update: bool) -> None:
        """SFT, reward models, DPO and KTO."""
        algorithm = make_algorithm(self.recipe, self.context)
        no_grad_rows = self.sizes.no_grad_rows
        if self.recipe.algorithm in ("dpo", "kto") and not only_update:
            self.tracker.move_to("reference", "before")
            with self.roles.inference_mode():
                batch = self._device_batch(no_grad_rows)
                self.roles.logps("reference", batch).logps.sum(dim=1).cpu()
                del batch
        self._create_optimizer()
        if not only_update:
            if isinstance(algorithm, KTO) and algorithm.estimates_kl:
                self.tracker.move_to(KL_ESTIMATE, "before")
            self._estimate_kl(algorithm)
            self.tracker.move_to("first check", "before")
            micro = self._device_batch(self.sizes.rows)
            algorithm.check(micro, 0)
            self.tracker.move_to("validation", "before")
            self._estimate_kl(algorithm)
            with self.roles.inference_mode():
                algorithm.eval_metrics(self._device_batch(no_grad_rows))
        step_batch = StepBatch(self._step_batch(0)) if isinstance(algorithm, KTO) else algorithm.collect(0)
        self._loop(algorithm, step_batch, not only_update)

    def _estimate_kl(self, algorithm: Algorithm[Any]) -> None:
        """The passes of KTO over mismatched rows, before each update and each validation."""
        if isinstance(algorithm, KTO) and algorithm.estimates_kl:
            algorithm.kl_estimator.estimate(rows_of_batch(self._batch(max(2, self.sizes.no_grad_rows))))

    def run_online(self, only_update: bool) -> None:
        """GRPO and PPO."""
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
            seed_of=_zero_seed,
            sizes=sizes,
            skip_logps=only_update,
        )
        algorithm = make_algorithm(self.recipe, self.context, collector)
        if only_update and isinstance(algorithm, PPO):
            algorithm._values = _no_values  # type: ignore[method-assign]
        self._create_optimizer()
        if not only_update and REWARD_ROLE in self.roles.heads and REWARD_ROLE not in self.trained:
            self.tracker.move_to("reward model", "before")
            rows = [[0] * self.sizes.length] * self.sizes.no_grad_rows
            score_rows(
                self.roles,
                rows,
                0,
                self.sizes.no_grad_tokens,
            )
        self.tracker.move_to("old and reference", "before")
        experience = algorithm.collect(0)
        if not only_update:
            self.tracker.move_to("first check", "before")
            micro = experience.batch.select_rows(torch.arange(self.sizes.rows))
            micro = micro.to(self.roles.base.device)
            algorithm.check(micro, 0)
            del micro
        self._loop(algorithm, experience, not only_update)

    def _loop(
        self,
        algorithm: Algorithm[Any],
        experience: StepBatch[Any],
        logged: bool,
    ) -> None:
        """Runs one step of the trainer with one micro-batch."""
        changes = {
            "micro_batch_size": self.sizes.units,
            "micro_batch_tokens": None,
            "logging_steps": 1,
            "max_nonfinite_steps": 1,
        }
        train = self.recipe.train.model_copy(update=changes)
        single_batch = _SingleBatchAlgorithm(
            algorithm,
            experience,
            self.sizes,
            self.tracker,
            logged,
            self.parameters,
            num_update_passes(self.recipe),
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
            ignore_event,
            _noop_step_end,
            checked=True,
            router_loss=self.roles.router_loss,
        )
        loop.run()


def num_update_passes(recipe: RecipeConfig) -> int:
    """Returns how often the update passes over a rollout batch."""
    if recipe.algorithm == "grpo":
        return recipe.grpo.num_iterations
    if recipe.algorithm == "ppo":
        return recipe.ppo.num_ppo_epochs * recipe.ppo.num_mini_batches
    return 1


MAX_SIMULATED_PASSES = 2
"""The second pass of the update uses as much memory as all later ones."""


@dataclass
class _RepeatedBatch(StepBatch[Batch]):
    """A batch that the update passes over `count` times."""

    count: int = 1

    def minibatches(self) -> Iterator[Batch]:
        for _ in range(min(MAX_SIMULATED_PASSES, self.count)):
            yield self.batch


@dataclass
class _SingleBatchAlgorithm(Algorithm[Batch]):
    """An algorithm with one micro-batch that reports its phases to the tracker."""

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
        if len(batch) > self.sizes.rows:
            batch = batch.select_rows(torch.arange(self.sizes.rows))
        return _RepeatedBatch(batch, count=self.num_passes)

    def token_weights(self, batch: Batch) -> Tensor:
        self.tracker.move_to("update", "before")
        # As from the second micro-batch on.
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.tracker.set_purpose((parameter.grad for parameter in self.parameters), "gradients")
        return self.algorithm.token_weights(batch)

    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]:
        terms = self.algorithm.compute_losses(micro)
        phases = PPO_UPDATE_PHASES if isinstance(self.algorithm, PPO) else UPDATE_PHASES
        for phase in phases:
            self.tracker.move_to(phase, "before")
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


MAX_LOSSES = 9
UPDATE_PHASES = ["update"] * MAX_LOSSES
PPO_UPDATE_PHASES = ["update", "update of the value"] + ["end"] * (MAX_LOSSES - 2)
"""Phase of each loss of an algorithm. After the last loss, `end` is entered."""


class _FakeRolloutCollector(RolloutCollector):
    """Made-up completions of the planned sizes. With `skip_logps` the model is not run."""

    def __init__(
        self,
        *,
        sizes: Sizes,
        skip_logps: bool,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.sizes = sizes
        self.skip_logps = skip_logps

    def logps(self, role: str, batch: RolloutBatch) -> Tensor:
        if self.skip_logps:
            return torch.zeros(batch.input_ids.shape)
        return super().logps(role, batch)

    def collect(
        self,
        step: int,
        draw: int,
        count: int | None = None,
    ) -> RolloutGroups:
        rows = self.sizes.num_rollouts
        n = self.num_generations
        batch = batch_of(rows, self.sizes)
        rewards = (torch.arange(rows) % 2).double().view(-1, n)
        return RolloutGroups(
            batch=RolloutBatch(
                **batch.tensors(),
                sampler_logps=torch.zeros(batch.input_ids.shape),
            ),
            rewards=rewards,
            reward_components=rewards.view(-1, 1),
            truncated=torch.zeros(rows, dtype=torch.bool),
            reward_names=self.reward_names,
            texts=[""] * rows,
            prompts=[],
        )


def _hook_layers(
    model: Any,
    tracker: AllocationTracker,
    mode: FakeDeviceMode,
) -> dict[nn.Module, Callable[[], None]]:
    """Reports to the tracker which layer runs, forward and backward, and makes its parts run under the mode if they are
    computed again. Returns the function that reports, by layer."""
    before_layers = dict[nn.Module, Callable[[], None]]()
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
            is_forward = torch._C._current_graph_task_id() == -1
            tracker.move_to(tracker.point[0], "forward" if is_forward else "backward", layer_position)

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
            if not isinstance(child, nn.Linear):
                mode.with_recompute(child, before)
        layer.register_forward_hook(after)
        before_layers[layer] = before
    return before_layers


def _hook_linears(
    before_layers: Mapping[nn.Module, Callable[[], None]],
    mode: FakeDeviceMode,
) -> None:
    """Makes a layer's own linears (Gemma 4) run under the mode if they are computed again. Called when adapters have
    replaced them."""
    for layer, before in before_layers.items():
        for child in layer.children():
            if isinstance(child, (nn.Linear, BaseTunerLayer)):
                mode.with_recompute(child, before)


def _start_pass(
    tracker: AllocationTracker,
    phase: str,
    pass_name: str,
) -> None:
    tracker.move_to(f"{phase}{PHASE_SEPARATOR}{pass_name}", "before")


def _no_prompts(
    step: int,
    draw: int,
    count: int | None,
) -> list[PromptExample]:
    raise AssertionError("the collector draws no prompts")


def _zero_seed(number: int) -> int:
    return 0


def _no_values(batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch.input_ids.shape), torch.zeros(len(batch))


class _NullRewards:
    def submit(self, *_: Any) -> None: ...
    def collect(self) -> dict[int, Any]:
        return {}


def _noop_step_end(state: TrainerState, last: bool) -> None: ...
