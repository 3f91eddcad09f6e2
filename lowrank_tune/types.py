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
    """One tokenized conversation: ids, and for each whether the assistant says it. Lists of one length."""

    input_ids: Sequence[int]
    completion_mask: Sequence[bool]


@dataclass(frozen=True)
class WeightedMean:
    """A mean that adds: total over count. Both are 0-d tensors or numbers."""

    total: Tensor | float
    count: Tensor | float

    def __add__(self, other: WeightedMean) -> WeightedMean:
        return WeightedMean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        count = float(self.count)
        if count:
            return float(self.total) / count
        return float("nan")


Stats = dict[str, WeightedMean]


def add_stats(into: Stats, more: Mapping[str, WeightedMean]) -> None:
    """Adds `more` to `into`, name by name."""
    for name, mean in more.items():
        into[name] = into[name] + mean if name in into else mean


def to_floats(stats: Mapping[str, WeightedMean]) -> dict[str, float]:
    """All means as numbers, with one transfer from the device."""
    flat = [value for mean in stats.values() for value in (mean.total, mean.count)]
    device = next((value.device for value in flat if isinstance(value, Tensor)), torch.device("cpu"))
    if flat:
        host = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in flat]).tolist()
    else:
        host = []
    return {name: WeightedMean(host[2 * i], host[2 * i + 1]).value for i, name in enumerate(stats)}


@dataclass
class Batch:
    """Rows padded to one length T, on the right.

    input_ids (B, T) long; attention_mask (B, T) bool: a real token; completion_mask (B, T) bool: a token that the loss
    is about (SFT: a token of the assistant; RL: a token of the policy); token_weights (B, T) fp32, or (B,) where whole
    rows have a weight: set by an algorithm's `token_weights`, once for the whole optimizer step, before any split;
    extra: further tensors with B rows, (B,) or (B, T): of pairs `margin`, `row` (its number in the data); of pairs and
    groups `shared` (leading tokens that a row has in common with the first row of its pair or group; 0 starts one);
    and those that an algorithm adds.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    token_weights: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each row up to the last attended one."""
        positions = torch.arange(1, self.input_ids.shape[1] + 1, device=self.input_ids.device)
        return (self.attention_mask * positions).amax(dim=1)

    @property
    def loss_mask(self) -> Tensor:
        """(B, T) bool: `completion_mask`, but never a padding slot and never a row's first token, before which there is
        nothing."""
        loss_mask = self.completion_mask & self.attention_mask
        loss_mask[:, 0] = False
        loss_mask[:, 1:] &= self.attention_mask[:, :-1]
        return loss_mask

    def select_rows(self, rows: Tensor, width: int | None = None) -> Batch:
        """These rows, cut to `width` columns, by default to the columns that they need, at least one."""
        width = max(1, int(self.lengths[rows].max()) if width is None else width)

        def take_rows(tensor: Tensor) -> Tensor:
            picked = tensor[rows]
            if picked.ndim > 1 and picked.shape[1] == self.input_ids.shape[1]:
                return picked[:, :width]
            return picked

        return Batch(
            take_rows(self.input_ids),
            take_rows(self.attention_mask),
            take_rows(self.completion_mask),
            None if self.token_weights is None else take_rows(self.token_weights),
            {name: take_rows(tensor) for name, tensor in self.extra.items()},
        )

    def split(self, rows: int | None = None, tokens: int | None = None, rows_per_unit: int = 1) -> Iterator[Batch]:
        """Micro-batches of at most `rows` rows, or of at most `tokens` tokens with padding, of rows of similar length,
        longest first.

        `rows_per_unit` adjacent rows stay in one micro-batch (2 for pairs). A unit larger than the budget comes alone.
        Units that share a beginning with their neighbors (`shared`) stay next to them, so that a micro-batch reads it
        once for many.
        """
        lengths: list[int] = self.lengths.view(-1, rows_per_unit).amax(dim=1).tolist()
        units: list[int] = []
        width = 0
        for unit in self._units_by_length(lengths, rows_per_unit):
            count = (len(units) + 1) * rows_per_unit
            wider = max(width, lengths[unit])
            if units and ((rows is not None and count > rows) or (tokens is not None and count * wider > tokens)):
                yield self._select_units(units, rows_per_unit, width)
                units = []
                wider = lengths[unit]
            units.append(unit)
            width = wider
        if units:
            yield self._select_units(units, rows_per_unit, width)

    def _units_by_length(self, lengths: Sequence[int], rows_per_unit: int) -> list[int]:
        """Units by falling length of the longest one of their family: those that share a beginning; without such, of
        their own."""
        family = list(range(len(lengths)))
        if "shared" in self.extra:
            family = (self.extra["shared"][::rows_per_unit] == 0).cumsum(0).tolist()
        longest: dict[int, int] = {}
        for unit, length in enumerate(lengths):
            longest[family[unit]] = max(length, longest.get(family[unit], 0))
        return sorted(range(len(lengths)), key=lambda unit: (-longest[family[unit]], family[unit], -lengths[unit]))

    def _select_units(self, units: Sequence[int], rows_per_unit: int, width: int) -> Batch:
        return self.select_rows(
            torch.tensor(
                [unit * rows_per_unit + i for unit in units for i in range(rows_per_unit)], device=self.input_ids.device
            ),
            width,
        )

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            completion_mask=self.completion_mask.to(device),
            token_weights=None if self.token_weights is None else self.token_weights.to(device),
            extra={name: tensor.to(device) for name, tensor in self.extra.items()},
        )


@dataclass(frozen=True)
class LogProbs:
    """log p(token t | tokens before t) and the entropy of that distribution, (B, T) fp32; 0 where nothing was
    scored."""

    logps: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LossTerm:
    """One loss, already weighted (a sum over the micro-batch), with its statistics. Its graph dies before the next term
    is made."""

    loss: Tensor
    stats: Stats


@dataclass
class StepBatch:
    """The result of `collect` for one step: a batch, and metrics of the collecting. `minibatches` are PPO's epochs and
    minibatches."""

    batch: Batch
    stats: Stats = field(default_factory=dict)

    def minibatches(self) -> Iterator[Batch]:
        yield self.batch


class Algorithm(Protocol):
    """An algorithm: three methods of a step, and a little state.

    `collect` returns the rows of a step; `token_weights` turns their mask into token weights, once; `compute_losses`
    yields losses, one graph alive at a time. `step_metrics` computes, without gradient, metrics that cost too much for
    every step; `eval_metrics` those of held-out rows (`loss` among them: the best step has the lowest);
    `should_continue` False ends the inner epochs early.

    `check` gets the first micro-batch of each start before any update, `step` steps after the run's start; it raises
    TrainingError where the reference is not what it must be. `iter_warnings` yields warnings about the metrics of a
    step.
    """

    rows_per_unit: int
    """Adjacent rows that stay in one micro-batch."""

    def collect(self, step: int) -> StepBatch: ...
    def token_weights(self, batch: Batch) -> Tensor: ...
    def compute_losses(self, micro: Batch) -> Iterator[LossTerm]: ...
    def step_metrics(self, micro: Batch) -> Stats: ...
    def eval_metrics(self, micro: Batch) -> Stats: ...
    def check(self, micro: Batch, step: int) -> None: ...
    def iter_warnings(self, metrics: Mapping[str, float]) -> Iterator[str]: ...
    def should_continue(self, stats: Stats) -> bool: ...
    def state(self) -> dict[str, float]: ...
    def restore(self, state: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class SamplingParams:
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
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "budget"]
    logps: list[float] | None = None


@dataclass(frozen=True)
class Token:
    """A token as it is drawn: `token_id` of sample `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    token_id: int
