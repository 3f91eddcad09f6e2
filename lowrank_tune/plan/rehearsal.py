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

from lowrank_tune import settings
from lowrank_tune.algorithms.harvest import Harvest, Harvester
from lowrank_tune.algorithms.kit import Kit
from lowrank_tune.algorithms.ppo import PPO
from lowrank_tune.build import ALGORITHMS, ONLINE
from lowrank_tune.build.learned import ROLE, score_rows
from lowrank_tune.build.stacks import HEADS, lay_out
from lowrank_tune.data import Asked
from lowrank_tune.model import logps
from lowrank_tune.model.roles import Roles
from lowrank_tune.plan.base import Layer, bare_base, shallow, stored
from lowrank_tune.plan.depth import Peaks
from lowrank_tune.plan.figures import PASS
from lowrank_tune.plan.ledger import Ledger
from lowrank_tune.plan.optimizers import planned_optimizer
from lowrank_tune.plan.pretend import Pretend, pretending
from lowrank_tune.plan.rollouts import Decoding, decode
from lowrank_tune.plan.rows import Sizes, batch_of
from lowrank_tune.train import Loop, Progress
from lowrank_tune.types import Batch, Experience, Stats, Term


@dataclass(frozen=True)
class Scene:
    """All that is rehearsed but for depth. `loaded` are the shapes of adapters that come from files, `below_reward`
    what lies under a reward model that is not trained; `rollouts` by name of their phase."""

    recipe: settings.Recipe
    config: Any
    device: torch.device
    sizes: Sizes
    loaded: Mapping[str, LoraConfig] = field(default_factory=dict)
    below_reward: Sequence[str] = ()
    rollouts: Mapping[str, Decoding] = field(default_factory=dict)


def rehearse(scene: Scene, layers: Sequence[Layer], only_update: bool = False) -> Peaks:
    """Runs every phase once, or the update alone, or where the scene has rollouts these alone, on a base of these
    layers; what was alive when."""
    recipe, ledger = scene.recipe, Ledger(scene.device.type, scene.config.get_text_config().vocab_size)
    with (
        warnings.catch_warnings(),
        ledger,
        pretending(scene.device) as mode,
        patch.object(logps, "_one_chunk", _few_chunks(logps._one_chunk)),
    ):
        warnings.simplefilter("ignore")
        stage = _Stage(scene, layers, ledger, mode)
        if scene.rollouts:
            stage.draw()
        elif recipe.algorithm in ONLINE:
            stage.online(only_update)
        else:
            stage.offline(only_update)
    return {moment: peak for moment, peak in ledger.peaks.items() if moment[0] != "start"}


def _few_chunks(one_chunk: Callable[..., None]) -> Callable[..., None]:
    """The output head's chunks are alike: after the second each finds the same memory as the one before, until the
    last, which may be short."""

    def some(head: Any, hidden: Tensor, targets: Tensor, temperature: float, into: Tensor, *more: Any) -> None:
        begins, whole = into.storage_offset(), into.untyped_storage().nbytes() // into.element_size()
        if begins <= len(into) or begins + len(into) == whole:
            one_chunk(head, hidden, targets, temperature, into, *more)

    return some


class _Stage:
    """One algorithm over a shallow base, ready to run its phases."""

    def __init__(self, scene: Scene, layers: Sequence[Layer], ledger: Ledger, mode: Pretend) -> None:
        self.scene, self.recipe, self.sizes, self.ledger = scene, scene.recipe, scene.sizes, ledger
        base = bare_base(shallow(scene.config, layers), self.recipe.base.model, self.recipe.base.bits, scene.device)
        configs, stacks = lay_out(self.recipe, base.model, scene.loaded, scene.below_reward)
        _watch(base.model, ledger, mode)
        with torch.device("meta"):
            self.roles = Roles(
                base,
                configs,
                [self.recipe.trained, *self.recipe.aside],
                stacks,
                sum(layer.recomputed for layer in layers),
                0,
                HEADS & stacks.keys(),
                self.recipe.train.activation_offloading,
            )
        ledger.rename(stored(base.model), "weights")
        ledger.rename((p for name, p in base.model.named_parameters() if "lora_" in name), "adapters")
        ledger.rename((head.weight for head in self.roles.heads.values()), "adapters")
        self.trained = (self.recipe.trained, *self.recipe.aside)
        named = [self.roles.parameters(role) for role in self.trained]
        self.parameters: list[nn.Parameter] = [parameter for several in named for parameter in several]
        self.optimizer: Any = None
        self.kit = Kit(self.roles, lambda step: self._batch(self.sizes.rows))

    def _batch(self, rows: int) -> Batch:
        batch = batch_of(rows, self.sizes)
        if self.recipe.algorithm == "dpo":
            batch.extra["reference"] = torch.zeros(rows)
        return batch

    def draw(self) -> None:
        """Completions of training, and answers to held-out questions. The optimizer's moments lie there meanwhile."""
        self._ready()
        for phase, decoding in self.scene.rollouts.items():
            decode(self.roles, decoding, self.ledger.named("KV cache"), partial(_begin, self.ledger, phase))

    def _ready(self) -> None:
        """As from the second step on: the optimizer's moments are there."""
        self.ledger.at("start")
        with self.ledger.named("optimizer"):
            self.optimizer = planned_optimizer(self.parameters, self.recipe.train, self.scene.device)

    def offline(self, only_update: bool) -> None:
        algorithm = ALGORITHMS[self.recipe.algorithm](self.kit, self.recipe)
        if self.recipe.algorithm == "dpo" and not only_update:
            self.ledger.at("reference", "before")
            with self.roles.quiet():
                self.roles.logps("reference", self._batch(self.sizes.free_rows()).to(self.roles.base.device)).logps.sum(
                    dim=1
                ).cpu()
        self._ready()
        if not only_update:
            self.ledger.at("first check", "before")
            micro = self._batch(self.sizes.rows).to(self.roles.base.device)
            algorithm.check(micro, 0)
            self.ledger.at("validation", "before")
            with self.roles.quiet():
                algorithm.measure(self._batch(self.sizes.free_rows()).to(self.roles.base.device))
        self._loop(algorithm, algorithm.collect(0), not only_update)

    def online(self, only_update: bool) -> None:
        rollout, sizes = self.recipe.rollout, self.sizes
        if only_update:
            sizes = replace(sizes, harvest=-(-sizes.rows // sizes.group) * sizes.group)
        harvester = _Harvester(
            self.roles,
            _no_prompts,
            _Silent(),
            ["reward"],
            [1.0],
            str,
            frozenset(),
            0,
            rollout.num_generations,
            rollout.max_new_tokens,
            rollout.temperature,
            1,
            self.sizes.free_tokens,
            lambda number: 0,
            sizes=sizes,
            known=only_update,
        )
        algorithm = ONLINE[self.recipe.algorithm](self.recipe, self.kit, harvester)
        if only_update and isinstance(algorithm, PPO):
            algorithm._values = _no_values  # type: ignore[method-assign]
        self._ready()
        if not only_update and ROLE in self.roles.heads and ROLE not in self.trained:
            self.ledger.at("reward model", "before")
            score_rows(self.roles, [[0] * self.sizes.length] * self.sizes.free_rows(), 0, self.sizes.free_tokens)
        self.ledger.at("old and reference", "before")
        experience = algorithm.collect(0)
        if not only_update:
            self.ledger.at("first check", "before")
            algorithm.check(experience.batch.take(torch.arange(self.sizes.rows)).to(self.roles.base.device), 0)
        self._loop(algorithm, experience, not only_update)

    def _loop(self, algorithm: Any, experience: Experience, logged: bool) -> None:
        """One step of the real loop, of one micro-batch."""
        train = self.recipe.train.model_copy(
            update={
                "micro_batch_size": self.sizes.units,
                "micro_batch_tokens": None,
                "log_every": 1,
                "max_bad_steps": 1,
            }
        )
        passes = {"grpo": self.recipe.grpo.epochs, "ppo": self.recipe.ppo.epochs * self.recipe.ppo.minibatches}.get(
            self.recipe.algorithm, 1
        )
        once = _Once(
            algorithm.together, algorithm, experience, self.sizes, self.ledger, logged, self.parameters, passes
        )
        self.optimizer.register_step_pre_hook(lambda *_: self.ledger.at("optimizer", "before"))
        loop = Loop(
            once,
            self.parameters,
            self.optimizer,
            train,
            1,
            0,
            self.scene.device,
            lambda event: None,
            _no_border,
            checked=True,
        )
        loop.run()


@dataclass
class _Parts(Experience):
    """Where a harvest is passed over several times, the second time stands for all further ones."""

    count: int = 1

    def parts(self) -> Iterator[Batch]:
        for _ in range(min(2, self.count)):
            yield self.batch


@dataclass
class _Once:
    """An algorithm of one micro-batch, whose phases are told apart."""

    together: int
    algorithm: Any
    experience: Experience
    sizes: Sizes
    ledger: Ledger
    logged: bool
    parameters: Sequence[nn.Parameter]
    parts: int

    def collect(self, step: int) -> Experience:
        batch = self.experience.batch
        return _Parts(
            batch if len(batch) <= self.sizes.rows else batch.take(torch.arange(self.sizes.rows)), count=self.parts
        )

    def weigh(self, batch: Batch) -> Tensor:
        self.ledger.at("update", "before")
        for parameter in self.parameters:  # as from the second micro-batch on
            parameter.grad = torch.zeros_like(parameter)
        self.ledger.rename((parameter.grad for parameter in self.parameters), "gradients")
        return self.algorithm.weigh(batch)  # type: ignore[no-any-return]

    def terms(self, micro: Batch) -> Iterator[Term]:
        terms = self.algorithm.terms(micro)
        for number in range(9):
            self.ledger.at(UPDATES[number] if isinstance(self.algorithm, PPO) else "update", "before")
            term = next(terms, None)
            if term is None:
                return
            self.ledger.at(self.ledger.moment[0], "after")
            yield term

    def observe(self, micro: Batch) -> Stats:
        if not self.logged:
            return {}
        self.ledger.at("measuring KL", "before")
        return self.algorithm.observe(micro)  # type: ignore[no-any-return]

    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]:
        return iter(())

    def go_on(self, stats: Stats) -> bool:
        return True

    def measure(self, micro: Batch) -> Stats:
        return {}

    def check(self, micro: Batch, step: int) -> None: ...

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None: ...


UPDATES = ("update", "update of the value", *["end"] * 7)


class _Harvester(Harvester):
    """Completions that nobody drew, of the sizes that are planned for. Where their log-probs are `known` nothing goes
    through the model."""

    def __init__(self, *arguments: Any, sizes: Sizes, known: bool) -> None:
        super().__init__(*arguments)
        self.sizes, self.known = sizes, known

    def logps(self, role: str, batch: Batch) -> Tensor:
        return torch.zeros(batch.ids.shape) if self.known else super().logps(role, batch)

    def draw(self, step: int, draw: int, count: int | None = None) -> Harvest:
        rows, n = self.sizes.harvest, self.num_generations
        batch = batch_of(rows, self.sizes)
        batch.extra["sampler"] = torch.zeros(batch.ids.shape)
        rewards = (torch.arange(rows) % 2).double().view(-1, n)
        return Harvest(
            batch, rewards, rewards.view(-1, 1), torch.zeros(rows, dtype=torch.bool), self.names, [""] * rows, []
        )


def _watch(model: Any, ledger: Ledger, mode: Pretend) -> None:
    """Tells the ledger which layer runs, forward and backward; and has its parts run under the mode where they are
    computed again."""
    layers = next(one for one in model.get_decoder().modules() if isinstance(one, nn.ModuleList))
    last = len(layers) - 1
    for number, layer in enumerate(layers):
        place = "first" if number == 0 else "last" if number == last else "between"

        def before(place: str = place) -> None:
            ledger.at(ledger.moment[0], "forward" if torch._C._current_graph_task_id() == -1 else "backward", place)

        def after(module: Any, given: Any, out: Any, place: str = place, ends: bool = number == last) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: ledger.at(ledger.moment[0], "backward", place))
            if ends:
                ledger.at(ledger.moment[0], "after")

        for child in layer.children():
            mode.through(child, before)
        layer.register_forward_hook(after)


def _begin(ledger: Ledger, phase: str, which: str) -> None:
    ledger.at(f"{phase}{PASS}{which}", "before")


def _no_prompts(step: int, draw: int, count: int | None) -> list[Asked]:
    raise AssertionError("nobody asks")


def _no_values(batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch.ids.shape), torch.zeros(len(batch))


class _Silent:
    def submit(self, *_: Any) -> None: ...
    def collect(self) -> dict[int, Any]:
        return {}


def _no_border(progress: Progress, last: bool) -> None: ...
