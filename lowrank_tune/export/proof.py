"""What was trained against what was merged: the same rows and greedy answers through both, the second one read back
from its files.

The trained model answers first, and what it thought at each place is kept (its logits at the last places of each text,
in fp32 and in the main memory, as many as `KEPT_BYTES` holds); then it can go, and the merged one reads the same texts.
Its greedy answer is the same as long as its likeliest token is; where the two first part, a near-tie of the trained
model's first two choices excuses it: a gap under `NEAR_TIE`, or under two steps of bf16 at that size, which no software
that runs in bf16 could tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_tune import settings
from lowrank_tune.data import Prompt, Template, load, prompts
from lowrank_tune.errors import RunFailed, UserError
from lowrank_tune.evaluate import questions_in, questions_of
from lowrank_tune.events import Emit, Note, Progress
from lowrank_tune.model.base import Base, load_base, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.rollout import Engine
from lowrank_tune.rollout.engine import memory_of
from lowrank_tune.types import Row, Sampling

LIMIT = 1e-3
"""Nats a token of KL(trained || merged), in the weights that were trained over."""
WORST = 0.1
"""The same at one token: a mean over answers that a model is sure of hides much (of `tiny-tutor`, original for
dequantised weights: mean 4e-4, largest 0.3), and rounding to bf16 makes at most a hundredth of this."""
NEAR_TIE = 0.05
PARTED = 0.04
"""Share of greedy answers that may part at a wider gap: bf16 weights move a logit by more than `NEAR_TIE` now and then,
and what is wrong parts many."""
PROMPTS, ROWS, ANSWER, LONGEST = 50, 50, 32, 1024
KEPT_BYTES = 1 << 30
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Probes:
    """What both models are asked: prompts (ids), held-out rows where the recipe has rows, and in words where they come
    from."""

    prompts: list[list[int]]
    rows: list[Row]
    origin: str


@dataclass(frozen=True)
class Heard:
    """What the trained model said: `texts` are prompts with its greedy answers, which begin at `starts`, and then the
    held-out rows; `logits` (K, V) foretell the last K tokens of each text; `loss` of what the assistant says in the
    rows, in nats a token."""

    texts: list[list[int]]
    starts: list[int]
    logits: list[Tensor]
    rows: list[Row]
    loss: float
    origin: str


@dataclass(frozen=True)
class Proof:
    """Trained against merged: mean and largest KL in nats a token, the largest difference of two logits, how many
    greedy answers are the same, part at a near-tie, or part elsewhere, and the losses on held-out rows (of the greedy
    answers, where a run has no rows)."""

    prompts: int
    places: int
    kl: float
    worst_kl: float
    logit_difference: float
    same: int
    near_ties: int
    parted: int
    trained_loss: float
    merged_loss: float
    rows: int
    ends_agree: bool
    origin: str

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def faults(self, exact: bool) -> list[str]:
        """What must not be; where the merged weights need not be those that were trained over, only what can never
        be."""
        found = []
        if not math.isfinite(self.kl):
            found.append("its logits are not finite")
        if exact and not self.kl <= LIMIT:
            found.append(f"KL(trained || merged) is {self.kl:.2e} nats a token, above {LIMIT:g}")
        if exact and not self.worst_kl <= WORST:
            found.append(f"KL(trained || merged) is {self.worst_kl:.2g} nats at one token, above {WORST:g}")
        if exact and self.parted > PARTED * self.prompts:
            found.append(f"{self.parted} of {self.prompts} greedy answers part where the trained model had no near-tie")
        if not self.ends_agree:
            found.append("its answers end at other tokens")
        return found

    def table(self) -> list[tuple[str, str]]:
        """Rows for people."""
        loss = "held-out loss" if self.rows else "loss of the greedy answers"
        return [
            ("KL(trained || merged), nats a token", f"{self.kl:.2e}"),
            ("largest KL at one token", f"{self.worst_kl:.2e}"),
            ("largest difference of two logits", f"{self.logit_difference:.3g}"),
            (
                f"greedy answers of {self.prompts} prompts",
                f"{self.same} the same, {self.near_ties} part at a near-tie, {self.parted} elsewhere",
            ),
            (f"{loss}, trained", f"{self.trained_loss:.4f}"),
            (f"{loss}, merged", f"{self.merged_loss:.4f}"),
            ("end tokens", "the same" if self.ends_agree else "DIFFERENT"),
            ("measured on", f"{self.places:,} tokens; {self.origin}"),
        ]


def probes(recipe: settings.Recipe, template: Template, emit: Emit) -> Probes:
    """Held-out prompts and rows of the recipe; where they are few, or its data is no longer there, the kit's own
    problems beside them."""
    try:
        found = _of_recipe(recipe, template)
    except UserError as error:
        emit(
            Note(
                level="warning", message=f"the run's own data cannot be read ({error}): compared on the kit's problems"
            )
        )
        found = Probes([], [], "")
    if len(found.prompts) == PROMPTS:
        return found
    built_in = _asked(prompts(settings.Source(dataset="tutor", split="heldout"), PROMPTS, recipe.seed), template)
    origin = f"{found.origin} and the kit's problems" if found.prompts else "the kit's problems"
    return Probes([*found.prompts, *built_in][:PROMPTS], found.rows, origin)


def _of_recipe(recipe: settings.Recipe, template: Template) -> Probes:
    rows, asked, origin = list[Row](), list[list[int]](), "held-out prompts"
    if recipe.algorithm in ("sft", "dpo"):
        data = load(recipe.data, template, recipe.seed, _silent, pairs=recipe.pairs)
        store = data.validation if data.validation is not None and data.validation.units else data.train
        origin = "validation rows" if store is data.validation else "training rows"
        rows = [store[unit * store.together] for unit in range(min(ROWS, store.units))]
        asked = [question.ids for question in questions_in(store, template, PROMPTS)]
    source = recipe.evaluate.heldout or (recipe.data.train[0] if not rows else None)
    if source is not None:
        origin = f"{origin} and held-out prompts" if rows else origin if recipe.evaluate.heldout else "training prompts"
        asked = _asked(prompts(source, PROMPTS, recipe.seed, recipe.data.system), template)
    return Probes([ids for ids in asked if len(ids) <= LONGEST], rows, origin)


def _asked(found: Sequence[Prompt], template: Template) -> list[list[int]]:
    return [
        question.ids
        for question in questions_of([one for one in found if template.spoils(one.messages) is None], template)
    ]


def hear(roles: Roles, asked: Probes, ends: frozenset[int], emit: Emit) -> Heard:
    """Lets the trained model answer, and keeps what it thought."""
    answers = {}
    for number, completion in enumerate(
        Engine(roles, "policy").generate(asked.prompts, 1, Sampling(ANSWER, ends, 0.0)), 1
    ):
        answers[completion.prompt] = completion.ids
        emit(Progress(what="the trained model answers", done=number, total=len(asked.prompts)))
    texts = [[*prompt, *answers[number]] for number, prompt in enumerate(asked.prompts)]
    texts += [[int(token) for token in row.ids] for row in asked.rows]
    most = max(ANSWER, KEPT_BYTES // (4 * roles.head.weight.shape[0] * len(texts)))
    losses, kept = _Losses(asked.rows), list[Tensor]()
    with roles.quiet(), roles.use("policy"):
        for number, text in enumerate(texts):
            logits = _foretold(roles.base, text)
            losses.add(number - len(asked.prompts), logits)
            kept.append(logits[-most:].clone())
    return Heard(texts, [len(prompt) for prompt in asked.prompts], kept, asked.rows, losses.mean, asked.origin)


def place_for(weights: int, device: torch.device, emit: Emit) -> tuple[torch.device, torch.dtype]:
    """Where a model of so many weights can be read back, and in which precision: the device of the run; or in bf16 the
    main memory, where a card that trained it in 4 bits is too small for 16. Raises UserError where neither holds it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    needed, there = weights * dtype.itemsize + (1 << 30), memory_of(device)
    if device.type == "cuda" and needed > there:
        emit(
            Note(
                message=f"the merged model needs {needed / 2**30:.0f} GiB and the card has {there / 2**30:.0f}: it "
                f"is compared on the CPU"
            )
        )
        device, there = CPU, memory_of(CPU)
    if needed > there:
        raise UserError(
            f"the merged model must be read back to be compared, which needs {needed / 2**30:.0f} GiB of memory, and "
            f"this machine "
            f"has {there / 2**30:.0f}; merge on a larger one, or use the adapter as it is"
        )
    return device, dtype


def prove(
    folder: Path, heard: Heard, ends: frozenset[int], place: tuple[torch.device, torch.dtype], emit: Emit
) -> Proof:
    """Reads the merged model back as a user would, and lets it read the same. Raises RunFailed where it cannot even be
    read."""
    wanted = settings.Base(model=str(folder), bits=16)
    try:
        base = load_base(wanted, load_tokenizer(wanted), *place)
    except UserError as error:
        raise RunFailed(f"the merged model cannot be read back, and nothing is left of it: {error}") from error
    base.model.eval()
    kls, differences, outcomes = list[Tensor](), list[float](), list[str]()
    losses, own = _Losses(heard.rows), (_Mean(), _Mean())
    with torch.no_grad():
        for number, (text, trained) in enumerate(zip(heard.texts, heard.logits, strict=True)):
            merged = _foretold(base, text)
            losses.add(number - len(heard.starts), merged)
            merged = merged[-len(trained) :]
            p, q = trained.log_softmax(dim=-1), merged.log_softmax(dim=-1)
            kls.append((p.exp() * (p - q)).sum(dim=-1))
            differences.append(float((trained - merged).abs().max()))
            if number < len(heard.starts):
                answer = torch.tensor(text[heard.starts[number] :])
                outcomes.append(_parting(trained[-len(answer) :], merged[-len(answer) :], answer))
                for mean, one in zip(own, (p, q), strict=True):
                    mean.add(-one[-len(answer) :].gather(1, answer[:, None]))
            emit(Progress(what="the merged model reads the same", done=number + 1, total=len(heard.texts)))
    kl = torch.cat(kls)
    compared = (heard.loss, losses.mean) if heard.rows else (own[0].value, own[1].value)
    return Proof(
        len(heard.starts),
        len(kl),
        float(kl.mean()),
        float(kl.max()),
        max(differences),
        outcomes.count("same"),
        outcomes.count("near-tie"),
        outcomes.count("parted"),
        *compared,
        len(heard.rows),
        _generation_ends(base) == ends and base.end_ids == ends,
        heard.origin,
    )


class _Mean:
    """A mean over all that was added."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total, self.count = self.total + float(values.double().sum()), self.count + values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


class _Losses:
    """-log p of what the assistant says in these rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self._found = rows, _Mean()

    @property
    def mean(self) -> float:
        return self._found.value

    def add(self, number: int, logits: Tensor) -> None:
        """Row `number`, where it is one, with the logits that foretell all its tokens but the first."""
        if number < 0:
            return
        row = self.rows[number]
        said = torch.tensor(list(row.says)[1:], dtype=torch.bool)
        targets = torch.tensor([int(token) for token in row.ids])[1:][said]
        self._found.add(-logits[said].log_softmax(dim=-1).gather(1, targets[:, None]))


def _parting(trained: Tensor, merged: Tensor, said: Tensor) -> str:
    """Whether the merged model would have given the same greedy answer, (K, V) logits of both for the K tokens that
    were said."""
    parted = (merged.argmax(dim=-1) != said).nonzero()
    if not len(parted):
        return "same"
    first, second = (float(value) for value in trained[int(parted[0])].topk(2).values)
    # between neighbours in bf16, which has 8 binary digits
    step = 2.0 ** (math.frexp(max(abs(first), abs(second)))[1] - 8)
    return "near-tie" if first - second < max(NEAR_TIE, 2 * step) else "parted"


def _foretold(base: Base, ids: Sequence[int]) -> Tensor:
    """(T - 1, V) fp32 in the main memory: the logits of every token but the first."""
    with base.autocast():
        logits = base.model(input_ids=torch.tensor([list(ids)], device=base.device), use_cache=False).logits
    return torch.as_tensor(logits[0, :-1]).float().cpu()


def _generation_ends(base: Base) -> frozenset[int]:
    """Where an answer ends for software that reads the generation config alone."""
    found = getattr(base.model.generation_config, "eos_token_id", None)
    return frozenset([found] if isinstance(found, int) else found or [])


def _silent(event: object) -> None:
    pass
