"""`lowrank-tune score`: responses scored with the rewards of a recipe, or with the reward model of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.assembly import load_roles
from lowrank_tune.assembly.finished_run import load_finished_reward_run
from lowrank_tune.assembly.reward_model import REWARD_ROLE
from lowrank_tune.assembly.rope import select_rope
from lowrank_tune.config import (
    AdapterConfig,
    DataConfig,
    RecipeConfig,
    SourceConfig,
)
from lowrank_tune.data import (
    ChatTemplate,
    TokenizedDataset,
    collate_rows,
    load,
    read_source,
)
from lowrank_tune.data.report import DroppedRows
from lowrank_tune.data.tokenize import format_of
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.grading import (
    MICRO_TOKENS,
    reward_models_in,
    total_reward,
    use_base_model,
)
from lowrank_tune.evaluation.questions import split_row
from lowrank_tune.evaluation.responses import ResponseItem, ResponseReader
from lowrank_tune.evaluation.validation import PairScores, validation_batches
from lowrank_tune.events import Emit, Progress, ignore_event, loading_progress, warning
from lowrank_tune.model.adapters import SavedAdapter, read_adapter
from lowrank_tune.model.base import load_base, load_tokenizer
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors, factors_of
from lowrank_tune.rewards import (
    Score,
    WeightedReward,
    WorkerPool,
    build_rewards,
)
from lowrank_tune.rewards.verdicts import exceeds_failure_limit, score_all


@dataclass(frozen=True)
class ScoredResponse:
    """One response with the score of a reward model: its location, prompt and text, the tokens of the answer, and the
    side of a pair."""

    location: str
    prompt: str
    text: str
    tokens: int
    score: float
    side: str = ""

    def to_record(self) -> dict[str, Any]:
        """Returns the object for a file."""
        record: dict[str, Any] = {"location": self.location}
        if self.side:
            record["side"] = self.side
        return {
            **record,
            "score": self.score,
            "tokens": self.tokens,
        }


@dataclass
class CompletionScores:
    """Scores of the rewards, in the order of `responses`; fewer if `interrupted`. `dropped` are rows without a usable
    response."""

    weighted: list[WeightedReward]
    responses: list[ResponseItem]
    max_failure_rate: float
    dropped: dict[str, DroppedRows] = field(default_factory=dict)
    scores: list[list[Score]] = field(default_factory=list)
    interrupted: bool = False

    def stop_reason(self) -> str | None:
        """Returns why a run would stop at these failures, None if it would not."""
        return exceeds_failure_limit(self.weighted, self.scores, self.max_failure_rate)

    def to_records(self) -> Iterator[dict[str, Any]]:
        """Yields one object per response, for a file."""
        for response, scores in zip(self.responses, self.scores, strict=False):
            rewards = {}
            for weighted_reward, score in zip(self.weighted, scores, strict=True):
                rewards[weighted_reward.name] = {
                    "value": score.value,
                    "verdict": score.verdict,
                    "reason": score.reason,
                    "seconds": round(score.seconds, 6),
                }
            yield {
                "location": response.location,
                "number": response.index,
                "reward": total_reward(self.weighted, scores),
                "rewards": rewards,
            }


def score_completions(
    recipe: RecipeConfig,
    file: str | None,
    limit: int | None,
    emit: Emit,
    device: torch.device | None = None,
) -> CompletionScores:
    """Scores the responses of a file, or the reference answers of the data, with the rewards of a recipe.

    Raises UserError if there are no responses, or a reward cannot be built. After Ctrl-C the result contains the scores
    so far.
    """
    if not recipe.rewards:
        raise UserError(
            f"{recipe.name or 'this recipe'} has no rewards: `algorithm: {recipe.algorithm}` learns from its rows alone"
        )
    weighted = build_rewards(recipe.rewards, Path.cwd())
    reward_models = reward_models_in(weighted)
    if reward_models and REWARD_ROLE not in recipe.adapters:
        raise UserError(
            "`reward_model` needs the adapter of an earlier stage of this chain, and only a run has it: name it with "
            f"stages.{recipe.name}.adapters.{REWARD_ROLE}.path=RUN/N-NAME"
        )
    template = _load_template(recipe)
    reader = ResponseReader(recipe, template, bool(reward_models))
    result = CompletionScores(weighted, [], recipe.rollout.max_reward_failure_rate)
    if file is None:
        responses = reader.references(emit)
    else:
        responses = reader.responses(file, weighted, result.dropped)
    result.responses = responses[:limit]
    if reward_models:
        saved = _read_adapters(recipe)
        with loading_progress(recipe.base.model, emit):
            factors = factors_of(select_rope((recipe,), emit))
            roles = _load_roles(
                recipe,
                saved,
                template,
                factors,
                device,
                emit,
            )
        for reward_model in reward_models:
            use_base_model(
                reward_model,
                roles,
                REWARD_ROLE,
                template,
            )
    with WorkerPool[int]([reward.reward for reward in weighted]) as pool:
        _score_responses(result, pool, emit)
    return result


def _score_responses(
    result: CompletionScores,
    pool: WorkerPool[int],
    emit: Emit,
) -> None:
    """Adds the scores to the result, after Ctrl-C those so far."""
    total = len(result.responses)
    items = [response.reward_input for response in result.responses]

    def report(done: int) -> None:
        emit(
            Progress(
                description="scoring",
                done=done,
                total=total,
            )
        )

    try:
        report(0)
        for scores in score_all(pool, items, report):
            result.scores.append(scores)
    except KeyboardInterrupt:
        result.interrupted = True


def score_file(
    run: Path,
    file: str,
    emit: Emit,
    device: torch.device | None = None,
) -> tuple[list[ScoredResponse], PairScores | None]:
    """Scores every usable row of a file with the reward model of a run; of preference pairs both sides, with the
    metrics of the pairs.

    A warning counts the rows that cannot be scored. Raises UserError if the run trained no reward model, or the file
    contains no row that can be scored.
    """
    finished = load_finished_reward_run(run)
    adapters = {**finished.recipe.adapters, REWARD_ROLE: AdapterConfig(path=str(finished.path))}
    recipe = finished.recipe.model_copy(update={"adapters": adapters})
    template = _load_template(recipe)
    source = SourceConfig(dataset=file)
    is_pairs = format_of(source, read_source(source, 0)) == "preference"
    rows = _load_rows(
        recipe,
        source,
        is_pairs,
        template,
        emit,
    )
    roles = _load_roles(
        recipe,
        _read_adapters(recipe),
        template,
        finished.rope_factors,
        device,
        ignore_event,
    )
    scores = _score_rows(roles, rows, template, emit)
    responses = [
        _response(
            rows,
            row,
            float(scores[row]),
            is_pairs,
            template,
        )
        for row in range(len(rows))
    ]
    if not is_pairs:
        return responses, None
    tokens = torch.tensor([response.tokens for response in responses])
    return responses, PairScores.of_rows(scores, tokens)


def _load_rows(
    recipe: RecipeConfig,
    source: SourceConfig,
    is_pairs: bool,
    template: ChatTemplate,
    emit: Emit,
) -> TokenizedDataset:
    """Returns the rows of a file, tokenized as the rows of the run were."""
    data = DataConfig(
        train=(source,),
        eval_fraction=0.0,
        system_prompt=recipe.data.system_prompt,
        max_length=recipe.data.max_length,
        max_invalid_fraction=1.0,
    )
    loaded = load(
        data,
        template,
        0,
        emit,
        pairs=is_pairs,
    )
    for line in loaded.report.lines():
        if "; dropped " in line:
            emit(warning(line))
    return loaded.train


def _score_rows(
    roles: Roles,
    rows: TokenizedDataset,
    template: ChatTemplate,
    emit: Emit,
) -> torch.Tensor:
    """Returns the score of each row."""
    scores = torch.empty(len(rows))
    collate_fn = partial(
        collate_rows,
        rows,
        pad_id=template.pad_id,
    )
    compute = partial(roles.sequence_scores, REWARD_ROLE)
    for values, indices in validation_batches(
        roles,
        rows,
        collate_fn,
        compute,
        MICRO_TOKENS,
        "scoring",
        emit,
    ):
        scores[indices] = values.cpu()
    return scores


def _response(
    rows: TokenizedDataset,
    number: int,
    score: float,
    is_pairs: bool,
    template: ChatTemplate,
) -> ScoredResponse:
    prompt_ids, answer_ids = split_row(rows[number])
    side = ""
    if is_pairs:
        side = ("chosen", "rejected")[number % 2]
    return ScoredResponse(
        rows.row_location(number),
        template.decode(prompt_ids).strip(),
        template.decode(answer_ids).strip(),
        rows.num_trained_tokens(number),
        score,
        side,
    )


def _load_template(recipe: RecipeConfig) -> ChatTemplate:
    return ChatTemplate.from_config(load_tokenizer(recipe.base), recipe.data)


def _read_adapters(recipe: RecipeConfig) -> dict[str, SavedAdapter]:
    """Returns the saved adapters of a recipe, the reward model with its head. Raises UserError."""
    saved = {}
    for name, adapter in recipe.adapters.items():
        if adapter.path:
            saved[name] = read_adapter(
                adapter.path,
                f"adapters.{name}.path",
                head=name == REWARD_ROLE,
            )
    return saved


def _load_roles(
    recipe: RecipeConfig,
    saved: Mapping[str, SavedAdapter],
    template: ChatTemplate,
    factors: RopeFactors,
    device: torch.device | None,
    emit: Emit,
) -> Roles:
    """Returns the base with the saved adapters, for inference."""
    base = load_base(
        recipe.base,
        template.tokenizer,
        device,
        rope_factors=factors,
    )
    train = recipe.train.model_copy(update={"gradient_checkpointing": False})
    return load_roles(
        recipe.model_copy(update={"train": train}),
        base,
        saved,
        emit,
    )
