"""Harvesting: completions of a step's prompts, drawn from the policy and scored while others still decode. GRPO's and
PPO's `collect`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lowrank_tune.algorithms.failures import Failures, Unscored
from lowrank_tune.model.roles import Roles
from lowrank_tune.rollout import Engine
from lowrank_tune.types import Batch, Completion, Mean, Sampling, Stats

if TYPE_CHECKING:  # an algorithm must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.data import Asked


class Scoring(Protocol):
    """Scores completions on the side: `submit` as each finishes, `collect` waits for the rest. By key a value for each
    reward, or why there is none."""

    def submit(self, key: int, asked: Asked, text: str, completion: Completion) -> None: ...
    def collect(self) -> Mapping[int, Sequence[float] | Unscored]: ...


@dataclass
class Harvest:
    """Groups of completions. `batch` has prompt and completion in each row, groups adjacent, with `extra["sampler"]`,
    the log-probs that the completions were drawn with; rewards, and what was `earned` after penalties (groups, n);
    `parts` (B, rewards) before weighting. `unscored` (B of them) says of what no reward can be told for why; rewards,
    earned and parts are nan there."""

    batch: Batch
    rewards: Tensor
    parts: Tensor
    truncated: Tensor
    names: Sequence[str]
    texts: list[str]
    asked: list[Asked]
    seconds: dict[str, float] = field(default_factory=dict)
    earned: Tensor = field(default_factory=lambda: torch.zeros(0))
    unscored: list[Unscored | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.earned.numel():
            self.earned = self.rewards
        self.unscored = self.unscored or [None] * len(self.batch)

    @property
    def scored(self) -> Tensor:
        """(groups, n) bool."""
        return torch.tensor([one is None for one in self.unscored]).view_as(self.rewards)

    @property
    def groups(self) -> int:
        return len(self.rewards)

    def told(self) -> Batch:
        """The rows that were scored."""
        rows = self.scored.flatten().nonzero().squeeze(1)
        batch, group = self.batch.take(rows), rows // self.rewards.shape[1]
        if "shared" in batch.extra:  # where a group has lost its first row, another one is that now
            begins = torch.ones_like(rows, dtype=torch.bool).index_put(
                (torch.arange(1, len(rows)),), group[1:] != group[:-1]
            )
            batch.extra["shared"] = batch.extra["shared"].masked_fill(begins, 0)
        return batch

    def live(self, dead: Callable[[Tensor, Tensor], Tensor]) -> int:
        """How many groups have a signal."""
        return self.groups - int(dead(self.earned, self.scored).sum())

    def stats(self) -> Stats:
        """What a person watches, as means. Of rewards, over what was scored."""
        rewards, scored, lengths = self.rewards, self.scored, self.batch.says.sum(dim=1)
        parts, spreads = self.parts, rewards.std(dim=1, correction=0)
        if not bool(scored.all()):
            left = [group[told] for group, told in zip(rewards, scored, strict=True) if bool(told.any())]
            spreads = torch.tensor([float(group.std(correction=0)) for group in left], dtype=rewards.dtype)
            rewards, parts = rewards[scored], parts[scored.flatten()]
        several = self.names if len(self.names) > 1 else ()
        own = {f"reward_{name}": Mean(parts[:, i].sum(), len(parts)) for i, name in enumerate(several)}
        return {
            "reward": Mean(rewards.sum(), rewards.numel()),
            "reward_spread": Mean(spreads.sum(), len(spreads)),
            **own,
            "length": Mean(lengths.sum(), len(lengths)),
            "truncated": Mean(self.truncated.sum(), len(self.truncated)),
            **{name: Mean(value, 1) for name, value in self.seconds.items()},
        }

    def pick(self, wanted: Tensor) -> Harvest:
        """These groups, (groups,) bool."""
        n = self.rewards.shape[1]
        rows = wanted.repeat_interleave(n)
        places = rows.nonzero().squeeze(1)
        kept: list[int] = places.tolist()
        batch = self.batch.take(places, self.batch.ids.shape[1])
        return Harvest(
            batch,
            self.rewards[wanted],
            self.parts[rows],
            self.truncated[rows],
            self.names,
            [self.texts[i] for i in kept],
            [a for a, keep in zip(self.asked, wanted.tolist(), strict=True) if keep],
            self.seconds,
            self.earned[wanted],
            [self.unscored[i] for i in kept],
        )

    @classmethod
    def join(cls, several: Sequence[Harvest], pad_id: int) -> Harvest:
        """One after the other, padded to one width."""
        if len(several) == 1:
            return several[0]
        width = max(one.batch.ids.shape[1] for one in several)
        batches = [_widened(one.batch, width, pad_id) for one in several]
        extra = {name: torch.cat([batch.extra[name] for batch in batches]) for name in batches[0].extra}
        ids, attended, says = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "attended", "says")
        )
        batch = Batch(ids, attended, says, extra=extra)
        rewards, parts, truncated, earned = (
            torch.cat([getattr(one, name) for one in several]) for name in ("rewards", "parts", "truncated", "earned")
        )
        return cls(
            batch,
            rewards,
            parts,
            truncated,
            several[0].names,
            [text for one in several for text in one.texts],
            [asked for one in several for asked in one.asked],
            several[0].seconds,
            earned,
            [lost for one in several for lost in one.unscored],
        )


def _widened(batch: Batch, width: int, pad_id: int) -> Batch:
    more = width - batch.ids.shape[1]

    def wide(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, more), value=value) if tensor.ndim > 1 else tensor

    return Batch(
        wide(batch.ids, pad_id),
        wide(batch.attended, False),
        wide(batch.says, False),
        extra={name: wide(tensor, 0.0) for name, tensor in batch.extra.items()},
    )


@dataclass
class Harvester:
    """Draws completions. `prompts(step, draw, count)` gives the prompts of a step: the planned ones, or `count` others
    for a later draw."""

    roles: Roles
    prompts: Callable[[int, int, int | None], list[Asked]]
    scoring: Scoring
    names: Sequence[str]
    weights: Sequence[float]
    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]
    pad_id: int
    num_generations: int
    max_new_tokens: int
    temperature: float
    slots: int
    micro_tokens: int
    seed_of: Callable[[int], int]
    show: Callable[[int, Harvest, Tensor], None] = lambda step, harvest, advantages: None
    """Is told of each step's harvest, with the advantages (groups, n)."""
    failures: Failures = field(default_factory=Failures)

    def draw(self, step: int, draw: int, count: int | None = None) -> Harvest:
        """The completions of a step's prompts, grouped in the prompts' order, with their rewards."""
        begun = time.perf_counter()
        asked = self.prompts(step, draw, count)
        sampling = Sampling(self.max_new_tokens, self.stop_ids, self.temperature, self.seed_of(step * 16 + draw))
        n = self.num_generations
        done: dict[int, Completion] = {}
        texts: dict[int, str] = {}
        for completion in Engine(self.roles, "policy", self.slots).generate([one.ids for one in asked], n, sampling):
            key = completion.prompt * n + completion.sample
            body = completion.ids[:-1] if completion.finish == "stop" else completion.ids
            done[key], texts[key] = completion, self.decode(body)
            self.scoring.submit(key, asked[completion.prompt], texts[key], completion)
        rolled = time.perf_counter()
        scores = self.scoring.collect()
        unscored = [one if isinstance(one := scores[key], Unscored) else None for key in range(len(asked) * n)]
        self.failures.count(unscored)
        parts = torch.tensor(
            [_values(scores[key], len(self.weights)) for key in range(len(asked) * n)], dtype=torch.float64
        )
        rewards = (parts @ torch.tensor(list(self.weights), dtype=torch.float64)).view(len(asked), n)
        completions = [done[key] for key in range(len(asked) * n)]
        truncated = torch.tensor([one.finish == "length" for one in completions])
        seconds = {"rollout_seconds": rolled - begun, "score_seconds": time.perf_counter() - rolled}
        batch = _batch([asked[one.prompt].ids for one in completions], completions, self.pad_id)
        told = [texts[key] for key in range(len(completions))]
        return Harvest(batch, rewards, parts, truncated, self.names, told, asked, seconds, unscored=unscored)

    def logps(self, role: str, batch: Batch) -> Tensor:
        """Log-probs of what was written by a role, no gradient, (B, T) on the CPU."""
        rows, columns = batch.ids.shape
        found = torch.zeros(rows, columns)

        def read(units: Sequence[int]) -> Tensor:
            places = torch.tensor(list(units))
            shared = {"shared": batch.extra["shared"][places]} if "shared" in batch.extra else {}
            part = Batch(batch.ids[places], batch.attended[places], batch.says[places], extra=shared).to(
                self.roles.base.device
            )
            with self.roles.quiet():
                return self.roles.logps(role, part, self.temperature).logps.cpu()

        for units, logps in in_micro_batches(self.roles, rows, columns, self.micro_tokens, read):
            found[units[0] : units[-1] + 1] = logps
        return found


def in_micro_batches(
    roles: Roles, rows: int, columns: int, micro_tokens: int, read: Callable[[Sequence[int]], Tensor]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """What `read` makes of neighbouring rows, as many at once as fit `micro_tokens` and the memory."""
    at_once = max(1, micro_tokens // columns)
    for start in range(0, rows, at_once):
        yield from roles.limits.pieces("forward_tokens", range(start, min(start + at_once, rows)), columns, read)


def _values(found: Sequence[float] | Unscored, count: int) -> list[float]:
    """Not a number is what nobody can take for a reward."""
    return [math.nan] * count if isinstance(found, Unscored) else list(found)


def _batch(prompts: Sequence[Sequence[int]], completions: Sequence[Completion], pad_id: int) -> Batch:
    """Rows of prompt and completion, padded on the right."""
    width = max(len(prompt) + len(one.ids) for prompt, one in zip(prompts, completions, strict=True))
    ids = torch.full((len(completions), width), pad_id, dtype=torch.long)
    attended, says = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    sampler, shared = torch.zeros(ids.shape), torch.zeros(len(completions), dtype=torch.long)
    for row, (prompt, one) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), len(prompt) + len(one.ids)
        ids[row, :start], ids[row, start:end] = torch.tensor(list(prompt)), torch.tensor(one.ids)
        attended[row, :end], says[row, start:end] = True, True
        shared[row] = start if row and completions[row - 1].prompt == one.prompt else 0
        assert one.logps is not None, "the engine keeps log-probs"
        sampler[row, start:end] = torch.tensor(one.logps)
    return Batch(ids, attended, says, extra={"sampler": sampler, "shared": shared})
