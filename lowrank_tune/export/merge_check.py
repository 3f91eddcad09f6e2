"""Compares a merged model, read back from its files, with the trained model: the same rows and greedy answers.

The trained model answers first, and its logits at the last positions of each text are stored (in fp32 in main memory,
as many as `MAX_LOGIT_BYTES` allows). Then it can be released, and the merged model computes its logits for the same
texts. Its greedy answer is the same as long as the most likely token is. Where the two first differ, a near-tie of the
trained model's first two choices is accepted: a gap below `NEAR_TIE`, or below two steps of bf16 at that size, which no
software in bf16 could distinguish.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowrank_tune.batch import Row
from lowrank_tune.config import BaseConfig, RecipeConfig, SourceConfig
from lowrank_tune.data import ChatTemplate, accepted_prompts, load, load_heldout_prompts
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.evaluation.questions import EvalQuestion, render_questions, select_questions
from lowrank_tune.events import Emit, LogMessage, Progress, ignore_event, warning
from lowrank_tune.generation import Engine
from lowrank_tune.generation.cache_memory import device_memory
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.base import Base, base_dtype, load_base, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors

MAX_MEAN_KL = 1e-3
"""Nats per token of KL(trained || merged), in the weights of the training."""
MAX_TOKEN_KL = 0.1
"""The same at one token. A mean over answers of high probability hides large values (of `tiny-tutor`, original instead
of dequantized weights: mean 4e-4, largest 0.3), and rounding to bf16 causes at most a hundredth of this."""
NEAR_TIE = 0.05
MAX_DIVERGED_FRACTION = 0.04
"""Fraction of greedy answers that may differ at a wider gap: rounding to bf16 sometimes changes a logit by more than
`NEAR_TIE`, while a wrong merge changes many answers."""
MAX_PROMPTS = 50
MAX_ROWS = 50
MAX_NEW_TOKENS = 32
MAX_PROMPT_TOKENS = 1024
MAX_LOGIT_BYTES = 1 << 30
CPU = torch.device("cpu")
BUILTIN_PROBLEMS = SourceConfig(
    dataset="builtin:arithmetic",
    split="heldout",
)

Readback = tuple[torch.device, torch.dtype]
"""Device and precision in which the merged model is loaded."""


@dataclass(frozen=True)
class ProbePrompts:
    """Inputs of both models: prompts as token ids, held-out rows if the recipe has rows, and a description of their
    source."""

    prompts: list[list[int]]
    rows: list[Row]
    origin: str


@dataclass(frozen=True)
class RecordedOutputs:
    """Outputs of the trained model.

    `texts` are the prompts with its greedy answers, which begin at `starts`, and then the held-out rows; `logits` (K,
    V) predict the last K tokens of each text; `loss` of the trained tokens of the rows, in nats per token.
    """

    texts: list[list[int]]
    starts: list[int]
    logits: list[Tensor]
    rows: list[Row]
    loss: float
    origin: str


@dataclass(frozen=True)
class MergeReport:
    """Comparison of trained and merged model: mean and largest KL in nats per token, the largest difference of two
    logits, how many greedy answers are the same, differ at a near-tie, or differ elsewhere, and the losses on held-out
    rows (on the greedy answers, if the run has no rows)."""

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

    def faults(self, exact: bool) -> list[str]:
        """Returns the differences that are not acceptable; `exact`: the model was merged into the weights of the
        training."""
        problems = []
        if not math.isfinite(self.kl):
            problems.append("its logits are not finite")
        if exact and not self.kl <= MAX_MEAN_KL:
            problems.append(f"KL(trained || merged) is {self.kl:.2e} nats a token, above {MAX_MEAN_KL:g}")
        if exact and not self.worst_kl <= MAX_TOKEN_KL:
            problems.append(f"KL(trained || merged) is {self.worst_kl:.2g} nats at one token, above {MAX_TOKEN_KL:g}")
        if exact and self.parted > MAX_DIVERGED_FRACTION * self.prompts:
            problems.append(
                f"{self.parted} of {self.prompts} greedy answers differ where the trained model had no near-tie"
            )
        if not self.ends_agree:
            problems.append("its answers end at other tokens")
        return problems

    def table(self) -> list[tuple[str, str]]:
        """Returns labels and values for a table."""
        loss = "held-out loss" if self.rows else "loss of the greedy answers"
        answers = f"{self.same} the same, {self.near_ties} part at a near-tie, {self.parted} elsewhere"
        return [
            ("KL(trained || merged), nats a token", f"{self.kl:.2e}"),
            ("largest KL at one token", f"{self.worst_kl:.2e}"),
            ("largest difference of two logits", f"{self.logit_difference:.3g}"),
            (f"greedy answers of {self.prompts} prompts", answers),
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
    """Returns held-out prompts and rows of the recipe; if they are few, or the data no longer exists, with built-in
    problems. A prompt and its answer have at most `max_row_length` tokens."""
    max_prompt_length = MAX_PROMPT_TOKENS
    if max_row_length is not None:
        max_prompt_length = min(MAX_PROMPT_TOKENS, max_row_length - MAX_NEW_TOKENS)
    try:
        probes = _recipe_probes(recipe, template, max_prompt_length)
    except UserError as error:
        emit(warning(f"the run's own data cannot be read ({error}): the models are compared on built-in problems"))
        probes = ProbePrompts([], [], "")
    if len(probes.prompts) == MAX_PROMPTS:
        return probes
    built_in = _source_prompts(
        BUILTIN_PROBLEMS,
        recipe.seed,
        None,
        template,
        max_prompt_length,
    )
    origin = "built-in problems"
    if probes.prompts:
        origin = f"{probes.origin} and {origin}"
    prompts = [*probes.prompts, *built_in]
    return ProbePrompts(prompts[:MAX_PROMPTS], probes.rows, origin)


def _recipe_probes(
    recipe: RecipeConfig,
    template: ChatTemplate,
    max_prompt_length: int,
) -> ProbePrompts:
    """Returns prompts and rows of the recipe's own data. Raises UserError if it cannot be read."""
    eval_dataset = recipe.evaluate.eval_dataset
    prompts_of = partial(
        _source_prompts,
        seed=recipe.seed,
        system=recipe.data.system_prompt,
        template=template,
        max_prompt_length=max_prompt_length,
    )
    if recipe.algorithm not in ("sft", "dpo", "kto"):
        origin = "held-out prompts" if eval_dataset else "training prompts"
        return ProbePrompts(prompts_of(eval_dataset or recipe.data.train[0]), [], origin)
    data = load(
        recipe.data,
        template,
        recipe.seed,
        ignore_event,
        pairs=recipe.uses_pairs,
        labels=recipe.uses_labels,
    )
    store = data.train
    origin = "training rows"
    if data.validation is not None and data.validation.units:
        store = data.validation
        origin = "validation rows"
    rows = [store[row] for row in store.unit_starts[:-1][:MAX_ROWS].tolist()]
    if eval_dataset is not None:
        origin = f"{origin} and held-out prompts"
        prompts = prompts_of(eval_dataset)
    else:
        prompts = _short_prompts(select_questions(store, template, MAX_PROMPTS), max_prompt_length)
    return ProbePrompts(prompts, rows, origin)


def _source_prompts(
    source: SourceConfig,
    seed: int,
    system: str | None,
    template: ChatTemplate,
    max_prompt_length: int,
) -> list[list[int]]:
    """Returns the prompts of a source that the chat template accepts, of at most `max_prompt_length` tokens."""
    examples = load_heldout_prompts(
        source,
        MAX_PROMPTS,
        seed,
        system,
    )
    usable = accepted_prompts(examples, template)
    return _short_prompts(render_questions(usable, template), max_prompt_length)


def _short_prompts(questions: Sequence[EvalQuestion], max_length: int) -> list[list[int]]:
    return [question.prompt_ids for question in questions if len(question.prompt_ids) <= max_length]


def record_outputs(
    roles: Roles,
    probes: ProbePrompts,
    eos_token_ids: frozenset[int],
    emit: Emit,
) -> RecordedOutputs:
    """Returns the greedy answers of the trained model, and its logits."""
    sampling = SamplingParams(MAX_NEW_TOKENS, eos_token_ids, 0.0)
    answers = {}
    for completion in Engine(roles, "policy").generate(probes.prompts, 1, sampling):
        answers[completion.prompt] = completion.token_ids
        emit(
            Progress(
                description="the trained model answers",
                done=len(answers),
                total=len(probes.prompts),
            )
        )
    texts = [[*prompt, *answers[number]] for number, prompt in enumerate(probes.prompts)]
    for row in probes.rows:
        texts.append([int(token) for token in row.input_ids])
    bytes_per_position = 4 * roles.head.weight.shape[0] * len(texts)
    max_positions = max(MAX_NEW_TOKENS, MAX_LOGIT_BYTES // bytes_per_position)
    loss = _RowLoss(probes.rows)
    kept_logits: list[Tensor] = []
    with roles.inference_mode(), roles.activate("policy"):
        for number, text in enumerate(texts):
            logits = _next_token_logits(roles.base, text)
            loss.add(number - len(probes.prompts), logits)
            kept_logits.append(logits[-max_positions:].clone())
    starts = [len(prompt) for prompt in probes.prompts]
    return RecordedOutputs(
        texts,
        starts,
        kept_logits,
        probes.rows,
        loss.mean.value,
        probes.origin,
    )


def readback_device(
    weights: int,
    base_config: BaseConfig,
    device: torch.device,
    emit: Emit,
) -> Readback:
    """Returns device and dtype for loading a merged model of so many weights: those of the run, or the CPU and bf16 if
    a GPU that trained it in 4 bits is too small for the merged one. Raises UserError if neither has enough memory."""
    dtype = base_dtype(base_config, device)
    needed = weights * dtype.itemsize + (1 << 30)
    available = device_memory(device)
    if device.type == "cuda" and needed > available:
        message = (
            f"the merged model needs {needed / 2**30:.0f} GiB and the GPU has {available / 2**30:.0f}: it is compared "
            "on the CPU"
        )
        emit(LogMessage(message=message))
        device = CPU
        dtype = torch.bfloat16
        needed = weights * dtype.itemsize + (1 << 30)
        available = device_memory(CPU)
    if needed > available:
        raise UserError(
            f"the merged model must be read back to be compared, which needs {needed / 2**30:.0f} GiB of memory, and "
            f"this machine has {available / 2**30:.0f}; merge on a larger one, or use the adapter as it is"
        )
    return device, dtype


def compare_models(
    folder: Path,
    recorded: RecordedOutputs,
    eos_token_ids: frozenset[int],
    readback: Readback,
    emit: Emit,
    rope_factors: RopeFactors = "short",
) -> MergeReport:
    """Loads the merged model as a user would, with the rotary frequencies of the run, and compares its outputs with the
    recorded ones. Raises TrainingError if it cannot be loaded."""
    base_config = BaseConfig(model=str(folder), bits=16)
    try:
        base = load_base(
            base_config,
            load_tokenizer(base_config),
            *readback,
            rope_factors=rope_factors,
        )
    except UserError as error:
        raise TrainingError(f"the merged model cannot be read back, and was not kept: {error}") from error
    base.model.eval()
    comparison = _Comparison(recorded)
    with torch.no_grad():
        for number, text in enumerate(recorded.texts):
            comparison.add(number, _next_token_logits(base, text))
            emit(
                Progress(
                    description="the merged model reads the same",
                    done=number + 1,
                    total=len(recorded.texts),
                )
            )
    ends_agree = _generation_eos_ids(base) == eos_token_ids and base.end_ids == eos_token_ids
    return comparison.report(ends_agree)


class _Comparison:
    """Differences between the recorded logits and those of the merged model."""

    def __init__(self, recorded: RecordedOutputs) -> None:
        self.recorded = recorded
        self.kls: list[Tensor] = []
        self.differences: list[float] = []
        self.outcomes: list[str] = []
        self.row_loss = _RowLoss(recorded.rows)
        self.trained_answer_loss = _Mean()
        self.merged_answer_loss = _Mean()

    def add(
        self,
        number: int,
        merged: Tensor,
    ) -> None:
        """Adds the merged model's logits for all tokens of text `number` except the first."""
        starts = self.recorded.starts
        self.row_loss.add(number - len(starts), merged)
        trained = self.recorded.logits[number]
        merged = merged[-len(trained) :]
        trained_logps = trained.log_softmax(dim=-1)
        merged_logps = merged.log_softmax(dim=-1)
        self.kls.append((trained_logps.exp() * (trained_logps - merged_logps)).sum(dim=-1))
        self.differences.append(float((trained - merged).abs().max()))
        if number < len(starts):
            answer = torch.tensor(self.recorded.texts[number][starts[number] :])
            length = len(answer)
            self.outcomes.append(_greedy_difference(trained[-length:], merged[-length:], answer))
            self.trained_answer_loss.add(-trained_logps[-length:].gather(1, answer[:, None]))
            self.merged_answer_loss.add(-merged_logps[-length:].gather(1, answer[:, None]))

    def report(self, ends_agree: bool) -> MergeReport:
        kl = torch.cat(self.kls)
        trained_loss = self.trained_answer_loss.value
        merged_loss = self.merged_answer_loss.value
        if self.recorded.rows:
            trained_loss = self.recorded.loss
            merged_loss = self.row_loss.mean.value
        return MergeReport(
            prompts=len(self.recorded.starts),
            places=len(kl),
            kl=float(kl.mean()),
            worst_kl=float(kl.max()),
            logit_difference=max(self.differences),
            same=self.outcomes.count("same"),
            near_ties=self.outcomes.count("near-tie"),
            parted=self.outcomes.count("parted"),
            trained_loss=trained_loss,
            merged_loss=merged_loss,
            rows=len(self.recorded.rows),
            ends_agree=ends_agree,
            origin=self.recorded.origin,
        )


class _Mean:
    """A mean over all values that were added, nan without values."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.total = self.total + float(values.double().sum())
        self.count = self.count + values.numel()

    @property
    def value(self) -> float:
        if self.count:
            return self.total / self.count
        return math.nan


class _RowLoss:
    """The mean of -log p of the trained tokens of rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.mean = _Mean()

    def add(
        self,
        number: int,
        logits: Tensor,
    ) -> None:
        """Adds row `number`, unless that is negative, with the logits that predict all its tokens except the first."""
        if number < 0:
            return
        row = self.rows[number]
        mask = torch.tensor(list(row.completion_mask)[1:], dtype=torch.bool)
        targets = torch.tensor([int(token) for token in row.input_ids])[1:][mask]
        logps = logits[mask].log_softmax(dim=-1)
        self.mean.add(-logps.gather(1, targets[:, None]))


def _greedy_difference(
    trained: Tensor,
    merged: Tensor,
    answer: Tensor,
) -> str:
    """Returns "same" if the merged model gives the same greedy answer, "near-tie" if the first difference is one, else
    "parted". Logits of both are (K, V) for the K tokens of the answer."""
    diverged = (merged.argmax(dim=-1) != answer).nonzero()
    if not len(diverged):
        return "same"
    first, second = trained[int(diverged[0])].topk(2).values.tolist()
    # the distance of neighbors in bf16, which has 8 binary digits
    exponent = math.frexp(max(abs(first), abs(second)))[1]
    step = 2.0 ** (exponent - 8)
    if first - second < max(NEAR_TIE, 2 * step):
        return "near-tie"
    return "parted"


def _next_token_logits(base: Base, ids: Sequence[int]) -> Tensor:
    """Returns the logits (T - 1, V) of all tokens except the first, in fp32 on the CPU."""
    input_ids = torch.tensor([list(ids)], device=base.device)
    with base.autocast():
        logits = base.model(
            input_ids=input_ids,
            use_cache=False,
        ).logits
    return torch.as_tensor(logits[0, :-1]).float().cpu()


def _generation_eos_ids(base: Base) -> frozenset[int]:
    """Returns the stop tokens for software that reads only the generation config."""
    eos_token_id = getattr(base.model.generation_config, "eos_token_id", None)
    if isinstance(eos_token_id, int):
        return frozenset([eos_token_id])
    return frozenset(eos_token_id or [])
