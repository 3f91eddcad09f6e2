"""What was trained against what was merged: the same rows and greedy answers through both, the second one read back
from its files.

The trained model answers first, and what it thought at each place is kept (its logits at the last places of each text,
in fp32 and in the main memory, as many as `MAX_LOGIT_BYTES` holds); then it can go, and the merged one reads the same
texts. Its greedy answer is the same as long as its likeliest token is; where the two first part, a near-tie of the
trained model's first two choices excuses it: a gap under `NEAR_TIE`, or under two steps of bf16 at that size, which no
software that runs in bf16 could tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_tune.config import BaseConfig, RecipeConfig, SourceConfig
from lowrank_tune.data import ChatTemplate, Prompt, load, load_heldout_prompts
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.evaluation.questions import render_questions, select_questions
from lowrank_tune.events import Emit, LogMessage, Progress
from lowrank_tune.generation import Engine
from lowrank_tune.generation.engine import device_memory
from lowrank_tune.model.base import Base, load_base, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors
from lowrank_tune.types import Row, SamplingParams

MAX_MEAN_KL = 1e-3
"""Nats a token of KL(trained || merged), in the weights that were trained over."""
MAX_TOKEN_KL = 0.1
"""The same at one token: a mean over answers that a model is sure of hides much (of `tiny-tutor`, original for
dequantized weights: mean 4e-4, largest 0.3), and rounding to bf16 makes at most a hundredth of this."""
NEAR_TIE = 0.05
MAX_DIVERGED_FRACTION = 0.04
"""Share of greedy answers that may part at a wider gap: bf16 weights move a logit by more than `NEAR_TIE` now and then,
and what is wrong parts many."""
MAX_PROMPTS = 50
MAX_ROWS = 50
MAX_NEW_TOKENS = 32
MAX_PROMPT_TOKENS = 1024
MAX_LOGIT_BYTES = 1 << 30
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ProbePrompts:
    """What both models are asked: prompts (ids), held-out rows where the recipe has rows, and in words where they come
    from."""

    prompts: list[list[int]]
    rows: list[Row]
    origin: str


@dataclass(frozen=True)
class RecordedOutputs:
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
class MergeReport:
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
        problems = []
        if not math.isfinite(self.kl):
            problems.append("its logits are not finite")
        if exact and not self.kl <= MAX_MEAN_KL:
            problems.append(f"KL(trained || merged) is {self.kl:.2e} nats a token, above {MAX_MEAN_KL:g}")
        if exact and not self.worst_kl <= MAX_TOKEN_KL:
            problems.append(f"KL(trained || merged) is {self.worst_kl:.2g} nats at one token, above {MAX_TOKEN_KL:g}")
        if exact and self.parted > MAX_DIVERGED_FRACTION * self.prompts:
            problems.append(
                f"{self.parted} of {self.prompts} greedy answers part where the trained model had no near-tie"
            )
        if not self.ends_agree:
            problems.append("its answers end at other tokens")
        return problems

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


def make_probes(
    recipe: RecipeConfig,
    template: ChatTemplate,
    emit: Emit,
    max_row_length: int | None = None,
) -> ProbePrompts:
    """Held-out prompts and rows of the recipe; where they are few, or its data is no longer there, the kit's own
    problems beside them. A prompt and its answer have at most `max_row_length` tokens."""
    if max_row_length is None:
        longest = MAX_PROMPT_TOKENS
    else:
        longest = min(MAX_PROMPT_TOKENS, max_row_length - MAX_NEW_TOKENS)
    try:
        probes = _of_recipe(recipe, template, longest)
    except UserError as error:
        emit(
            LogMessage(
                level="warning", message=f"the run's own data cannot be read ({error}): compared on the kit's problems"
            )
        )
        probes = ProbePrompts([], [], "")
    if len(probes.prompts) == MAX_PROMPTS:
        return probes
    built_in = _prompt_ids(
        load_heldout_prompts(SourceConfig(dataset="builtin:arithmetic", split="heldout"), MAX_PROMPTS, recipe.seed),
        template,
        longest,
    )
    if probes.prompts:
        origin = f"{probes.origin} and the kit's problems"
    else:
        origin = "the kit's problems"
    return ProbePrompts([*probes.prompts, *built_in][:MAX_PROMPTS], probes.rows, origin)


def _of_recipe(recipe: RecipeConfig, template: ChatTemplate, longest: int) -> ProbePrompts:
    rows = list[Row]()
    prompt_ids = list[list[int]]()
    origin = "held-out prompts"
    if recipe.algorithm in ("sft", "dpo"):
        data = load(recipe.data, template, recipe.seed, _ignore_event, pairs=recipe.uses_pairs)
        if data.validation is not None and data.validation.units:
            store = data.validation
        else:
            store = data.train
        if store is data.validation:
            origin = "validation rows"
        else:
            origin = "training rows"
        rows = [store[unit * store.rows_per_unit] for unit in range(min(MAX_ROWS, store.units))]
        questions = select_questions(store, template, MAX_PROMPTS)
        prompt_ids = [question.prompt_ids for question in questions if len(question.prompt_ids) <= longest]
    source = recipe.evaluate.eval_dataset or (recipe.data.train[0] if not rows else None)
    if source is not None:
        if rows:
            origin = f"{origin} and held-out prompts"
        elif recipe.evaluate.eval_dataset:
            origin = origin
        else:
            origin = "training prompts"
        prompt_ids = _prompt_ids(
            load_heldout_prompts(source, MAX_PROMPTS, recipe.seed, recipe.data.system_prompt),
            template,
            longest,
        )
    return ProbePrompts(prompt_ids, rows, origin)


def _prompt_ids(examples: Sequence[Prompt], template: ChatTemplate, longest: int) -> list[list[int]]:
    """The prompts of at most `longest` tokens."""
    usable = [example for example in examples if template.validate_messages(example.messages) is None]
    questions = render_questions(usable, template)
    return [question.prompt_ids for question in questions if len(question.prompt_ids) <= longest]


def record_outputs(roles: Roles, probes: ProbePrompts, eos_token_ids: frozenset[int], emit: Emit) -> RecordedOutputs:
    """Lets the trained model answer, and keeps what it thought."""
    answers = {}
    for number, completion in enumerate(
        Engine(roles, "policy").generate(probes.prompts, 1, SamplingParams(MAX_NEW_TOKENS, eos_token_ids, 0.0)), 1
    ):
        answers[completion.prompt] = completion.token_ids
        emit(Progress(description="the trained model answers", done=number, total=len(probes.prompts)))
    texts = [[*prompt, *answers[number]] for number, prompt in enumerate(probes.prompts)]
    texts += [[int(token) for token in row.input_ids] for row in probes.rows]
    max_positions = max(MAX_NEW_TOKENS, MAX_LOGIT_BYTES // (4 * roles.head.weight.shape[0] * len(texts)))
    losses = _Losses(probes.rows)
    kept_logits = list[Tensor]()
    with roles.inference_mode(), roles.activate("policy"):
        for number, text in enumerate(texts):
            logits = _next_token_logits(roles.base, text)
            losses.add(number - len(probes.prompts), logits)
            kept_logits.append(logits[-max_positions:].clone())
    return RecordedOutputs(
        texts,
        [len(prompt) for prompt in probes.prompts],
        kept_logits,
        probes.rows,
        losses.mean,
        probes.origin,
    )


def readback_device(weights: int, device: torch.device, emit: Emit) -> tuple[torch.device, torch.dtype]:
    """Where a model of so many weights can be read back, and in which precision: the device of the run; or in bf16 the
    main memory, where a GPU that trained it in 4 bits is too small for 16. Raises UserError where neither holds it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    needed = weights * dtype.itemsize + (1 << 30)
    available = device_memory(device)
    if device.type == "cuda" and needed > available:
        emit(
            LogMessage(
                message=f"the merged model needs {needed / 2**30:.0f} GiB and the GPU has {available / 2**30:.0f}: it "
                f"is compared on the CPU"
            )
        )
        device = CPU
        available = device_memory(CPU)
    if needed > available:
        raise UserError(
            f"the merged model must be read back to be compared, which needs {needed / 2**30:.0f} GiB of memory, and "
            f"this machine "
            f"has {available / 2**30:.0f}; merge on a larger one, or use the adapter as it is"
        )
    return device, dtype


def compare_models(
    folder: Path,
    recorded: RecordedOutputs,
    eos_token_ids: frozenset[int],
    readback: tuple[torch.device, torch.dtype],
    emit: Emit,
    rope_factors: RopeFactors = "short",
) -> MergeReport:
    """Loads the merged model as a user would, with the rotary frequencies of the run, and compares its outputs with the
    recorded ones. Raises TrainingError where it cannot be loaded."""
    base_settings = BaseConfig(model=str(folder), bits=16)
    try:
        base = load_base(base_settings, load_tokenizer(base_settings), *readback, rope_factors=rope_factors)
    except UserError as error:
        raise TrainingError(f"the merged model cannot be read back, and nothing is left of it: {error}") from error
    base.model.eval()
    kls = list[Tensor]()
    differences = list[float]()
    outcomes = list[str]()
    losses = _Losses(recorded.rows)
    answer_losses = (_Mean(), _Mean())
    with torch.no_grad():
        for number, (text, trained) in enumerate(zip(recorded.texts, recorded.logits, strict=True)):
            merged = _next_token_logits(base, text)
            losses.add(number - len(recorded.starts), merged)
            merged = merged[-len(trained) :]
            p = trained.log_softmax(dim=-1)
            q = merged.log_softmax(dim=-1)
            kls.append((p.exp() * (p - q)).sum(dim=-1))
            differences.append(float((trained - merged).abs().max()))
            if number < len(recorded.starts):
                answer = torch.tensor(text[recorded.starts[number] :])
                outcomes.append(_greedy_difference(trained[-len(answer) :], merged[-len(answer) :], answer))
                for mean, logprobs in zip(answer_losses, (p, q), strict=True):
                    mean.add(-logprobs[-len(answer) :].gather(1, answer[:, None]))
            emit(Progress(description="the merged model reads the same", done=number + 1, total=len(recorded.texts)))
    kl = torch.cat(kls)
    if recorded.rows:
        compared = (recorded.loss, losses.mean)
    else:
        compared = (answer_losses[0].value, answer_losses[1].value)
    return MergeReport(
        len(recorded.starts),
        len(kl),
        float(kl.mean()),
        float(kl.max()),
        max(differences),
        outcomes.count("same"),
        outcomes.count("near-tie"),
        outcomes.count("parted"),
        *compared,
        len(recorded.rows),
        _generation_eos_ids(base) == eos_token_ids and base.end_ids == eos_token_ids,
        recorded.origin,
    )


class _Mean:
    """A mean over all that was added."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.total, self.count = self.total + float(values.double().sum()), self.count + values.numel()

    @property
    def value(self) -> float:
        if self.count:
            return self.total / self.count
        return math.nan


class _Losses:
    """-log p of what the assistant says in these rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._mean = _Mean()

    @property
    def mean(self) -> float:
        return self._mean.value

    def add(self, number: int, logits: Tensor) -> None:
        """Row `number`, where it is one, with the logits that foretell all its tokens but the first."""
        if number < 0:
            return
        row = self.rows[number]
        mask = torch.tensor(list(row.completion_mask)[1:], dtype=torch.bool)
        targets = torch.tensor([int(token) for token in row.input_ids])[1:][mask]
        self._mean.add(-logits[mask].log_softmax(dim=-1).gather(1, targets[:, None]))


def _greedy_difference(trained: Tensor, merged: Tensor, answer: Tensor) -> str:
    """Whether the merged model would have given the same greedy answer, (K, V) logits of both for the K tokens that
    were said."""
    diverged = (merged.argmax(dim=-1) != answer).nonzero()
    if not len(diverged):
        return "same"
    first, second = (float(value) for value in trained[int(diverged[0])].topk(2).values)
    # between neighbors in bf16, which has 8 binary digits
    step = 2.0 ** (math.frexp(max(abs(first), abs(second)))[1] - 8)
    if first - second < max(NEAR_TIE, 2 * step):
        return "near-tie"
    return "parted"


def _next_token_logits(base: Base, ids: Sequence[int]) -> Tensor:
    """(T - 1, V) fp32 in the main memory: the logits of every token but the first."""
    with base.autocast():
        logits = base.model(input_ids=torch.tensor([list(ids)], device=base.device), use_cache=False).logits
    return torch.as_tensor(logits[0, :-1]).float().cpu()


def _generation_eos_ids(base: Base) -> frozenset[int]:
    """Where an answer ends for software that reads the generation config alone."""
    eos_token_id = getattr(base.model.generation_config, "eos_token_id", None)
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or [])


def _ignore_event(event: object) -> None:
    pass
