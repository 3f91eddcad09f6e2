"""`lowrank-tune score RUN --file FILE`: a file of responses, scored by the reward model that a run trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.assembly import load_roles
from lowrank_tune.batch import Row
from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config import AdapterConfig, DataConfig, RecipeConfig, SourceConfig, from_dict
from lowrank_tune.data import ChatTemplate, TokenizedDataset, TokenizedSplits, collate_units, load, read_source
from lowrank_tune.data.tokenize import format_of
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.validation import PairScores, validation_batches
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.model.base import load_base, load_tokenizer
from lowrank_tune.model.rotary import stored_factors

MICRO_TOKENS = 1 << 14


@dataclass(frozen=True)
class ScoredResponse:
    """One scored answer: where it stands, what was asked and answered, tokens of the answer, its score, and of a pair
    its side."""

    location: str
    prompt: str
    text: str
    tokens: int
    score: float
    side: str = ""


def score_file(
    run: Path,
    file: str,
    emit: Emit,
    device: torch.device | None = None,
) -> tuple[list[ScoredResponse], PairScores | None]:
    """Scores every usable row of a file, in its order; of preference pairs both sides, with the figures of the pairs.

    Raises UserError where the run trained no reward model, or the file holds no row that can be scored; rows that
    cannot are told.
    """
    recipe, folder = reward_run(run)
    template = ChatTemplate.from_tokenizer(load_tokenizer(recipe.base), recipe.data.template_date)
    data, pairs = _rows(recipe, file, template, emit)
    rows = data.train
    adapters = {**recipe.adapters, "reward": AdapterConfig(path=str(folder))}
    recipe = recipe.model_copy(
        update={"adapters": adapters, "train": recipe.train.model_copy(update={"gradient_checkpointing": False})}
    )
    saved = {
        name: read_adapter(str(adapter_config.path), f"adapters.{name}.path", head=name == "reward")
        for name, adapter_config in adapters.items()
    }
    factors = stored_factors(_read_json_object(folder / "base.json"))
    base = load_base(recipe.base, template.tokenizer, device, rope_factors=factors)
    roles = load_roles(recipe, base, saved, _ignore_event)
    scores = torch.empty(len(rows))
    collate_fn = partial(collate_units, rows, pad_id=template.pad_id)
    for values, indices in validation_batches(
        roles,
        rows,
        collate_fn,
        partial(roles.sequence_scores, "reward"),
        MICRO_TOKENS,
        "scoring",
        emit,
    ):
        scores[indices] = values.cpu()
    lengths = torch.tensor([rows.num_trained_tokens(row) for row in range(len(rows))])
    responses = [_response(rows, row, float(scores[row]), pairs, template) for row in range(len(rows))]
    return responses, PairScores(scores[::2], scores[1::2], lengths[::2], lengths[1::2]) if pairs else None


def reward_run(run: Path) -> tuple[RecipeConfig, Path]:
    """The recipe and folder of the run, or of the reward stage of a chain."""
    check_run_format(run)
    facts = _read_json_object(run / "run.json")
    recipe = facts.get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"{run} is no run folder: it holds no run.json that can be read")
    if isinstance(recipe.get("stages"), list):
        folders = sorted(run.glob("[0-9]*-*"))
        stages = [
            folder
            for folder in folders
            if nested_mapping(_read_json_object(folder / "run.json"), "recipe").get("algorithm") == "reward"
        ]
        if not stages:
            raise UserError(f"{run} is a chain without a stage that trained a reward model")
        return reward_run(stages[-1])
    if recipe.get("algorithm") != "reward":
        raise UserError(
            f"{run} is a run of {recipe.get('algorithm')}; only `algorithm: reward` trains a model that scores "
            f"responses"
        )
    if not (run / "final").is_dir():
        raise UserError(
            f"{run} has not ended, so there is no reward model yet: let it end first, with the same command"
        )
    return from_dict(recipe), run


def _rows(recipe: RecipeConfig, file: str, template: ChatTemplate, emit: Emit) -> tuple[TokenizedSplits, bool]:
    source = SourceConfig(dataset=file)
    pairs = format_of(source, read_source(source, 0)) == "preference"
    data = DataConfig(
        train=(source,),
        eval_fraction=0.0,
        system_prompt=recipe.data.system_prompt,
        max_length=recipe.data.max_length,
        max_invalid_fraction=1.0,
    )
    loaded = load(data, template, 0, emit, pairs=pairs)
    for line in loaded.report.lines():
        if "; dropped " in line:
            emit(LogMessage(message=line, level="warning"))
    return loaded, pairs


def _response(
    rows: TokenizedDataset,
    number: int,
    score: float,
    pairs: bool,
    template: ChatTemplate,
) -> ScoredResponse:
    row: Row = rows[number]
    start = list(row.completion_mask).index(True)
    prompt, text = (
        template.decode([int(token) for token in ids]) for ids in (row.input_ids[:start], row.input_ids[start:])
    )
    side = ("chosen", "rejected")[number % 2] if pairs else ""
    return ScoredResponse(
        rows.row_location(number),
        prompt.strip(),
        text.strip(),
        rows.num_trained_tokens(number),
        score,
        side,
    )


def nested_mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in a file that anyone may have edited."""
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def _read_json_object(file: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _ignore_event(event: object) -> None:
    pass
