"""Helpers of the tests of algorithms: batches of pairs, rollouts without an engine, one step without the trainer, and
short runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CPU, VOCAB, gradients, llama_roles, make_batch, perturb, relative_error, zero_grad
from oracles import PlainModel
from torch import Tensor

from lowrank_tune import Recipe, run, runner
from lowrank_tune.algorithms.base import Algorithm, AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.kto import KTO
from lowrank_tune.algorithms.rollouts import RolloutCollector, RolloutGroups
from lowrank_tune.batch import Batch, LabeledBatch, PairBatch, RolloutBatch
from lowrank_tune.config import DPOConfig, KTOConfig
from lowrank_tune.data import PromptExample
from lowrank_tune.events import StepEnd
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model import packed_rows
from lowrank_tune.model.roles import Roles
from lowrank_tune.stats import add_stats, to_floats

# --- gradients --------------------------------------------------------------------------------------------------------


def policy_over_sft() -> Roles:
    """Returns fp32 roles: a frozen SFT adapter below the policy, both with random weights."""
    roles = llama_roles(16, lower=["sft"])
    perturb(roles, "sft", size=0.05)
    perturb(roles, "policy", size=0.05, seed=2)
    return roles


def by_key(roles: Roles, role: str) -> dict[str, Tensor]:
    """Returns the gradients of a role, under the names of PEFT's files."""
    found = {}
    for name, parameter in roles.named_parameters(role).items():
        if parameter.grad is None:
            continue
        key = name.replace(f".lt_{role}.", ".")
        if not key.startswith("base_model"):
            key = f"base_model.model.{key}".replace(f".lt_{role}", "")
        found[key] = parameter.grad
    return found


def error_against(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Returns the relative distance of two sets of gradients; infinite if they have other names."""
    if mine.keys() != theirs.keys():
        return math.inf
    return relative_error(
        torch.cat([mine[key].flatten() for key in theirs]), torch.cat([theirs[key].flatten() for key in theirs])
    )


def largest(errors: Sequence[float]) -> float:
    """Returns the largest error; infinite if one is nan."""
    return max(error if error == error else math.inf for error in errors)


def backward_step(algorithm: Algorithm[Any], batch: Batch, **split: int | None) -> tuple[float, dict[str, float]]:
    """Accumulates the gradients of one optimizer step, as the trainer does. Returns the loss and the metrics."""
    batch.token_weights = algorithm.token_weights(batch)
    loss = 0.0
    stats: dict[str, Any] = {}
    for micro in batch.split(rows_per_unit=algorithm.rows_per_unit, **split):
        for term in algorithm.compute_losses(micro):
            term.loss.backward()
            loss += float(term.loss.detach().double())
            add_stats(stats, term.stats)
    return loss, to_floats(stats)


# --- pairs ------------------------------------------------------------------------------------------------------------

LENGTHS = ((4, 3, 6), (1, 5, 2), (7, 1, 1), (3, 9, 4), (9, 2, 8))
"""Tokens of the prompt, of the chosen and of the rejected answer of each pair."""
MARGINS = (0.0, 0.5, 1.5, 0.0, 0.25)
LONG_PROMPTS = ((40, 6, 9), (33, 2, 12), (50, 1, 1))
"""Pairs whose prompts are long enough to be computed once."""
PAIR_SPLITS: tuple[dict[str, int | None], ...] = (
    {"rows": 2},
    {"rows": 4},
    {"rows": 6},
    {"tokens": 1},
    {"tokens": 40},
    {"tokens": 10_000},
)
"""Micro-batch sizes of a step of pairs."""
PAIR_PADDINGS: tuple[dict[str, Any], ...] = (
    {"more": 7},
    {"filler": 1},
    {"more": 3, "filler": VOCAB - 1},
    {"left": True},
    {"left": True, "more": 2, "filler": 9},
)
PAIR_ORDER = (3, 0, 4, 2, 1)
"""Another order of the pairs of `LENGTHS`."""


def pair_rows(
    lengths: Sequence[tuple[int, int, int]] = LENGTHS, seed: int = 0
) -> tuple[list[list[int]], list[list[bool]]]:
    """Returns rows chosen, rejected, chosen, rejected, ... and their masks. The two sides differ in the first token of
    the answer. Pad and end ids are inside too."""
    stream = torch.Generator().manual_seed(seed)
    rows, masks = [], []
    for prompt, *answers in lengths:
        prompt_ids = torch.randint(0, VOCAB, (prompt,), generator=stream).tolist()
        first = int(torch.randint(0, VOCAB, (), generator=stream))
        for side, length in enumerate(answers):
            answer = torch.randint(0, VOCAB, (length,), generator=stream).tolist()
            answer[0] = (first + side) % VOCAB
            rows.append([*prompt_ids, *answer])
            masks.append([False] * prompt + [True] * length)
    return rows, masks


def pair_batch(
    rows: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    reference: Sequence[float] | None = None,
    share: bool = False,
    margins: Sequence[float] = MARGINS,
    **padding: Any,
) -> PairBatch:
    """Returns a batch of pairs; with `share` the prompts count as shared prefixes."""
    batch = PairBatch(**make_batch(rows, masks, **padding).tensors())
    batch.row_indices = torch.arange(len(rows))
    batch.margin = torch.tensor([margin for margin in margins for _ in range(2)][: len(rows)])
    if reference is not None:
        batch.reference_sequence_logps = torch.tensor(reference, dtype=torch.float32)
    if share:
        prompt_lengths = [list(mask).index(True) for mask in masks]
        batch.shared_prefix = torch.tensor([length * (row % 2) for row, length in enumerate(prompt_lengths)])
    return batch


def reference_sums(roles: Roles, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> list[float]:
    """Returns log ref(y | x) of each row by the plain model, with the frozen adapter `sft` alone."""
    plain = PlainModel([roles.adapter_tensors("sft")])
    with torch.no_grad():
        return [float(plain.sequence_logp(row, mask, policy=False)) for row, mask in zip(rows, masks, strict=True)]


def collected_step(algorithm: Algorithm[Any], batch: Batch, **split: int | None) -> tuple[float, dict[str, float]]:
    """Runs `backward_step` over what `collect` returns for this batch."""

    def get_batch(step: int) -> Batch:
        return replace(batch)

    algorithm.context = replace(algorithm.context, get_batch=get_batch)
    return backward_step(algorithm, algorithm.collect(0).batch, **split)


def accumulated(
    algorithm: Algorithm[Any], batch: Batch, role: str = "policy", **split: int | None
) -> tuple[float, Tensor, dict[str, float]]:
    """Returns loss, gradient of the role, and metrics of one step."""
    zero_grad(algorithm.context.roles)
    loss, stats = collected_step(algorithm, batch, **split)
    return loss, gradients(algorithm.context.roles, role), stats


def loss_after_training(
    algorithm: Algorithm[Any], batch: Batch, role: str = "policy", steps: int = 30
) -> tuple[float, float, dict[str, float]]:
    """Trains on one batch. Returns the first loss, the last loss, and the last metrics."""
    optimizer = torch.optim.AdamW(algorithm.context.roles.parameters(role), lr=1e-2)
    losses: list[float] = []
    stats: dict[str, float] = {}
    for _ in range(steps):
        loss, _, stats = accumulated(algorithm, batch, role)
        losses.append(loss)
        optimizer.step()
    return losses[0], losses[-1], stats


def record_packing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Returns a list that gets an entry for each batch from now on: whether its shared prompts are computed once."""
    packed: list[bool] = []
    pack = packed_rows.pack_rows

    def recorded_pack(*arguments: Any) -> Any:
        layout = pack(*arguments)
        packed.append(layout is not None and layout.segments.key_index is not None)
        return layout

    monkeypatch.setattr(packed_rows, "pack_rows", recorded_pack)
    return packed


# --- DPO --------------------------------------------------------------------------------------------------------------

DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "sigmoid_norm")
DPO_BETA = 0.3
DPO_LABEL_SMOOTHING = 0.2


def dpo_over(roles: Roles, loss_type: str = "sigmoid", sft_coef: float = 0.0, **context: Any) -> DPO:
    """Returns DPO with `DPO_BETA` and `DPO_LABEL_SMOOTHING` over some roles."""
    settings = DPOConfig(
        loss_type=loss_type,
        beta=DPO_BETA,
        label_smoothing=DPO_LABEL_SMOOTHING,
        sft_coef=sft_coef,
    )
    return DPO(AlgorithmContext(roles, **context), settings)


# --- KTO --------------------------------------------------------------------------------------------------------------

KTO_LOSSES = ("kto", "apo_zero_unpaired")
KTO_BETA = 0.3
KTO_WEIGHTS = (1.5, 0.75)
"""Weights of desirable and undesirable answers."""


def labeled_batch(
    rows: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    reference: Sequence[float] | None = None,
    labels: Sequence[bool] | None = None,
    **padding: Any,
) -> LabeledBatch:
    """Returns a batch of answers with a label; by default every second one is undesirable."""
    batch = LabeledBatch(**make_batch(rows, masks, **padding).tensors())
    batch.row_indices = torch.arange(len(rows))
    batch.labels = torch.tensor(labels if labels is not None else [row % 2 == 0 for row in range(len(rows))])
    if reference is not None:
        batch.reference_sequence_logps = torch.tensor(reference, dtype=torch.float32)
    return batch


def kto_over(roles: Roles, loss_type: str = "kto", micro_tokens: int = 10_000, **context: Any) -> KTO:
    """Returns KTO with `KTO_BETA` and `KTO_WEIGHTS` over some roles."""
    desirable, undesirable = KTO_WEIGHTS
    settings = KTOConfig(
        loss_type=loss_type,
        beta=KTO_BETA,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
    )
    return KTO(AlgorithmContext(roles, **context), settings, max_length=64, micro_tokens=micro_tokens)


def small_kto(**changes: Any) -> dict[str, Any]:
    """Returns a recipe of KTO with four steps on the tiny model."""
    return {**small_dpo(**changes), "name": "kto", "algorithm": "kto"}


def own_reference_sums(roles: Roles, batch: Batch) -> Tensor:
    """Returns log ref(y | x) of each row, (B,), by the roles themselves."""
    with roles.inference_mode():
        return roles.logps("reference", batch).logps.sum(dim=1)


def small_dpo(**changes: Any) -> dict[str, Any]:
    """Returns a recipe of DPO with four steps on the tiny model."""
    return {
        "name": "dpo",
        "algorithm": "dpo",
        "base": {"model": "tiny-tutor", "bits": 16},
        "adapters": {"policy": {"r": 4}},
        "data": {
            "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 40}],
            "eval_fraction": 0.2,
            "max_length": 256,
        },
        "train": {
            "max_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "gradient_checkpointing": False,
        },
        **changes,
    }


# --- rollouts ---------------------------------------------------------------------------------------------------------

MAX_NEW_TOKENS = 12
INFORMATIVE_REWARDS = [[[1.0, 0.0, 0.0], [0.2, 0.9, 0.4]]]


def completion_rows(groups: int, n: int, seed: int = 0) -> tuple[list[list[int]], list[list[bool]]]:
    """Returns rows with completions of 1 to 11 tokens, n for each prompt, and their masks; pad and end ids are
    inside."""
    stream = np.random.default_rng(seed)
    rows, masks = [], []
    for _ in range(groups):
        prompt = stream.integers(0, VOCAB, stream.integers(1, 6)).tolist()
        for _ in range(n):
            length = int(stream.integers(1, MAX_NEW_TOKENS))
            rows.append([*prompt, *stream.integers(0, VOCAB, length).tolist()])
            masks.append([False] * len(prompt) + [True] * length)
    return rows, masks


class FakeCollector(RolloutCollector):
    """A collector of completions of random ids without an engine, with given rewards by draw; the log-probs are those
    of the roles.

    cut: rows that count as truncated; drift: noise of the sampler's log-probs. `logged` contains what it logs,
    `requested_counts` the counts that it is called with.
    """

    def __init__(
        self,
        roles: Any,
        rewards: Sequence[Sequence[Sequence[float]]],
        temperature: float = 1.0,
        cut: Sequence[int] = (),
        drift: float = 0.0,
        **padding: Any,
    ) -> None:
        super().__init__(
            roles=roles,
            prompts=None,  # type: ignore[arg-type]
            reward_client=None,  # type: ignore[arg-type]
            reward_names=("answer",),
            reward_weights=(1.0,),
            decode=str,
            stop_ids=frozenset({1}),
            pad_id=0,
            num_generations=0,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=temperature,
            max_num_seqs=8,
            micro_tokens=40,
            seed_of=int,
            log_group=lambda *arguments: self.logged.append(arguments),
        )
        self.rewards, self.cut, self.drift, self.padding = rewards, cut, drift, padding
        self.logged: list[tuple[Any, ...]] = []
        self.requested_counts: list[int | None] = []

    def collect(self, step: int, draw: int, count: int | None = None) -> RolloutGroups:
        self.requested_counts.append(count)
        rewards = torch.tensor(self.rewards[draw][:count], dtype=torch.float64)
        groups, n = rewards.shape
        rows, masks = completion_rows(groups, n, seed=100 * step + draw)
        batch = RolloutBatch(**make_batch(rows, masks, **self.padding).tensors())
        batch.sampler_logps = self.drawn_logps(batch, step)
        return RolloutGroups(
            batch=batch,
            rewards=rewards,
            reward_components=rewards.view(-1, 1),
            truncated=torch.tensor([row in self.cut for row in range(groups * n)]),
            reward_names=self.reward_names,
            texts=[f"prompt {draw}.{group} answer {i}" for group in range(groups) for i in range(n)],
            prompts=[PromptExample([2], f"prompt {draw}.{group}", None, {}) for group in range(groups)],
            timings={"rollout_seconds": 2.0},
        )

    def drawn_logps(self, batch: RolloutBatch, step: int) -> Tensor:
        """Returns the log-probs of the sampler."""
        if self.roles is None:
            return torch.zeros(batch.input_ids.shape)
        noise = torch.randn(batch.input_ids.shape, generator=torch.Generator().manual_seed(step))
        return self.logps("policy", batch) + self.drift * noise


class LengthReward:
    """A reward client that scores a completion with its number of tokens."""

    def __init__(self) -> None:
        self.scores: dict[int, list[float]] = {}

    def submit(self, key: int, prompt: PromptExample, text: str, completion: Completion) -> None:
        self.scores[key] = [float(len(completion.token_ids))]

    def collect(self) -> Mapping[int, Sequence[float]]:
        scores, self.scores = self.scores, {}
        return scores


def real_collector(roles: Roles, long: bool = False) -> RolloutCollector:
    """Returns a collector with the real engine, for three prompts; `long` ones are six times as long."""
    times = 6 if long else 1
    prompts = [
        PromptExample([2, 5, 9, 40] * times, "a", None, {}),
        PromptExample([2, 7] * times, "b", None, {}),
        PromptExample([3] * 9 * times, "c", None, {}),
    ]
    return RolloutCollector(
        roles=roles,
        prompts=lambda step, draw, count: prompts,
        reward_client=LengthReward(),
        reward_names=("length",),
        reward_weights=(1.0,),
        decode=str,
        stop_ids=frozenset({1}),
        pad_id=0,
        num_generations=4,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.8,
        max_num_seqs=5,
        micro_tokens=64,
        seed_of=int,
    )


def one_pass(algorithm: Algorithm[Any], batch: Batch, **split: int | None) -> tuple[float, Tensor, dict[str, float]]:
    """Returns loss, gradient of the policy, and metrics of one pass over a batch of rollouts."""
    zero_grad(algorithm.context.roles)
    loss, stats = backward_step(algorithm, batch, **split or {"rows": 4})
    return loss, gradients(algorithm.context.roles), stats


# --- runs -------------------------------------------------------------------------------------------------------------


def run_with_events(recipe: dict[str, Any], out: Path) -> tuple[Any, list[Any]]:
    """Runs a recipe. Returns the outcome and the events."""
    events: list[Any] = []
    return run(Recipe.from_dict(recipe), out=out, ui="none", device=CPU, on_event=events.append), events


def file_bytes(folder: Path) -> dict[Path, bytes]:
    """Returns the content of every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record_builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list that gets what each run from now on is built of."""
    built: list[Any] = []
    build = runner.build

    def recorded_build(*arguments: Any, **options: Any) -> Any:
        built.append(build(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(runner, "build", recorded_build)
    return built


def step_metrics(events: Sequence[Any]) -> list[dict[str, float]]:
    """Returns the metrics of each step, without those that depend on the machine."""
    unsteady = {"tokens_per_second", "memory_gib", "rollout_seconds", "reward_seconds"}
    return [
        {name: value for name, value in event.stats.items() if name not in unsteady}
        for event in events
        if isinstance(event, StepEnd)
    ]
