"""The values that pass between the floors. Entry t of every (B, T) tensor is about token t; a mask is named by what
True means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Row:
    """One tokenised conversation: ids, and for each whether the assistant says it. Lists of one length."""

    ids: Sequence[int]
    says: Sequence[bool]


@dataclass(frozen=True)
class Mean:
    """A mean that adds: total over count. Both are 0-d tensors or numbers."""

    total: Tensor | float
    count: Tensor | float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


Stats = dict[str, Mean]


def add_stats(into: Stats, more: Mapping[str, Mean]) -> None:
    """Adds `more` to `into`, name by name."""
    for name, mean in more.items():
        into[name] = into[name] + mean if name in into else mean


def to_floats(stats: Mapping[str, Mean]) -> dict[str, float]:
    """All means as numbers, with one transfer from the device."""
    flat = [value for mean in stats.values() for value in (mean.total, mean.count)]
    device = next((value.device for value in flat if isinstance(value, Tensor)), torch.device("cpu"))
    host = (
        torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in flat]).tolist()
        if flat
        else []
    )
    return {name: Mean(host[2 * i], host[2 * i + 1]).value for i, name in enumerate(stats)}


@dataclass
class Batch:
    """Rows padded to one length T, on the right.

    ids (B, T) long; attended (B, T) bool: a real token; says (B, T) bool: a token that the loss is about (SFT: the
    assistant says it; RL: the policy wrote it); weight (B, T) fp32, or (B,) where whole rows are weighed: set by an
    algorithm's `weigh`, once for the whole optimizer step, before any split; extra: further tensors with B rows, (B,)
    or (B, T): of pairs `margin`, `row` (its number in the data); of pairs and groups `shared` (leading tokens that a
    row has in common with the first row of its pair or group; 0 begins one); and what an algorithm brings.
    """

    ids: Tensor
    attended: Tensor
    says: Tensor
    weight: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each row up to the last attended one."""
        positions = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        return (self.attended * positions).amax(dim=1)

    @property
    def scored(self) -> Tensor:
        """(B, T) bool: `says`, but never a padding slot and never a row's first token, before which there is
        nothing."""
        scored = self.says & self.attended
        scored[:, 0] = False
        scored[:, 1:] &= self.attended[:, :-1]
        return scored

    def take(self, rows: Tensor, width: int | None = None) -> Batch:
        """These rows, cut to `width` columns, by default to the columns that they need, at least one."""
        width = max(1, int(self.lengths[rows].max()) if width is None else width)

        def cut(tensor: Tensor) -> Tensor:
            picked = tensor[rows]
            return picked[:, :width] if picked.ndim > 1 and picked.shape[1] == self.ids.shape[1] else picked

        return Batch(
            cut(self.ids),
            cut(self.attended),
            cut(self.says),
            None if self.weight is None else cut(self.weight),
            {name: cut(tensor) for name, tensor in self.extra.items()},
        )

    def split(self, rows: int | None = None, tokens: int | None = None, together: int = 1) -> Iterator[Batch]:
        """Micro-batches of at most `rows` rows, or of at most `tokens` tokens with padding, of rows of similar length,
        longest first.

        `together` adjacent rows stay in one micro-batch (2 for pairs). A unit larger than the budget comes alone. Units
        that share a beginning with their neighbours (`shared`) stay next to them, so that a micro-batch reads it once
        for many.
        """
        lengths: list[int] = self.lengths.view(-1, together).amax(dim=1).tolist()
        units: list[int] = []
        width = 0
        for unit in self._order(lengths, together):
            count, wider = (len(units) + 1) * together, max(width, lengths[unit])
            if units and ((rows is not None and count > rows) or (tokens is not None and count * wider > tokens)):
                yield self._units(units, together, width)
                units, wider = [], lengths[unit]
            units.append(unit)
            width = wider
        if units:
            yield self._units(units, together, width)

    def _order(self, lengths: Sequence[int], together: int) -> list[int]:
        """Units by falling length of the longest one of their family: those that share a beginning; without such, of
        their own."""
        family = list(range(len(lengths)))
        if "shared" in self.extra:
            family = (self.extra["shared"][::together] == 0).cumsum(0).tolist()
        longest: dict[int, int] = {}
        for unit, length in enumerate(lengths):
            longest[family[unit]] = max(length, longest.get(family[unit], 0))
        return sorted(range(len(lengths)), key=lambda unit: (-longest[family[unit]], family[unit], -lengths[unit]))

    def _units(self, units: Sequence[int], together: int, width: int) -> Batch:
        return self.take(
            torch.tensor([unit * together + i for unit in units for i in range(together)], device=self.ids.device),
            width,
        )

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            ids=self.ids.to(device),
            attended=self.attended.to(device),
            says=self.says.to(device),
            weight=None if self.weight is None else self.weight.to(device),
            extra={name: tensor.to(device) for name, tensor in self.extra.items()},
        )


@dataclass(frozen=True)
class LogProbs:
    """log p(token t | tokens before t) and the entropy of that distribution, (B, T) fp32; 0 where nothing was
    scored."""

    logps: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Term:
    """One loss, already weighted (a sum over the micro-batch), with its statistics. Its graph dies before the next term
    is made."""

    loss: Tensor
    stats: Stats


@dataclass
class Experience:
    """What `collect` brought for one step: a batch, and statistics of the collecting. `parts` are PPO's epochs and
    minibatches."""

    batch: Batch
    stats: Stats = field(default_factory=dict)

    def parts(self) -> Iterator[Batch]:
        yield self.batch


class Algorithm(Protocol):
    """An algorithm is three verbs and a little state.

    `collect` brings the rows of a step; `weigh` turns their mask into token weights, once; `terms` yields losses, one
    graph alive at a time. `observe` measures, without gradient, what is too dear for every step; `measure` what
    held-out rows are judged by (`loss` among it: the best step has the lowest); `go_on` False ends the inner epochs
    early.

    `check` sees the first micro-batch of each start before anything moves, `step` steps after the run's beginning; it
    raises RunFailed where the reference is not what it must be. `warnings` says what a person should worry about in the
    figures of a step.
    """

    together: int
    """Adjacent rows that stay in one micro-batch."""

    def collect(self, step: int) -> Experience: ...
    def weigh(self, batch: Batch) -> Tensor: ...
    def terms(self, micro: Batch) -> Iterator[Term]: ...
    def observe(self, micro: Batch) -> Stats: ...
    def measure(self, micro: Batch) -> Stats: ...
    def check(self, micro: Batch, step: int) -> None: ...
    def warnings(self, figures: Mapping[str, float]) -> Iterator[str]: ...
    def go_on(self, stats: Stats) -> bool: ...
    def state(self) -> dict[str, float]: ...
    def restore(self, state: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy. The stop ids end a completion and belong to it, as does the token that
    completes a stop string.

    top_k (0: all), top_p (1: all) and min_p (0: all) narrow the distribution, in this order, for evaluation and chat.
    `budget` bounds the tokens of a whole call of the engine.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    budget: int | None = None


@dataclass(frozen=True)
class Completion:
    """One completion of prompt number `prompt`: ids with the stop token, their log-probs where the engine has them, and
    why it ended.

    Ended by the budget of the whole call it may hold any number of tokens, none too.
    """

    prompt: int
    sample: int
    ids: list[int]
    finish: Literal["stop", "length", "budget"]
    logps: list[float] | None = None


@dataclass(frozen=True)
class Token:
    """A token as it is drawn: sample `sample` of prompt number `prompt` says `id`."""

    prompt: int
    sample: int
    id: int
