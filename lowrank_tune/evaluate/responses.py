"""A file of responses, scored by the reward model that a run trained: `lowrank-tune eval RUN --file
responses.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_tune import settings
from lowrank_tune.build import load_roles
from lowrank_tune.data import Prepared, Template, TokenStore, collate_units, load, read
from lowrank_tune.data.tokenise import shape_of
from lowrank_tune.errors import UserError
from lowrank_tune.evaluate.rows import PairScores, held_out
from lowrank_tune.events import Emit, Note
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.model.base import load_base, load_tokenizer
from lowrank_tune.recipe import from_dict
from lowrank_tune.types import Row

MICRO_TOKENS = 1 << 14


@dataclass(frozen=True)
class Response:
    """One scored answer: where it stands, what was asked and answered, tokens of the answer, its score, and of a pair
    its side."""

    place: str
    prompt: str
    text: str
    tokens: int
    score: float
    side: str = ""


def score_file(
    run: Path, file: str, emit: Emit, device: torch.device | None = None
) -> tuple[list[Response], PairScores | None]:
    """Scores every usable row of a file, in its order; of preference pairs both sides, with the figures of the pairs.

    Raises UserError where the run trained no reward model, or the file holds no row that can be scored; rows that
    cannot are told.
    """
    recipe, folder = reward_run(run)
    template = Template.of(load_tokenizer(recipe.base))
    data, pairs = _rows(recipe, file, template, emit)
    rows = data.train
    adapters = {**recipe.adapters, "reward": settings.Adapter(path=str(folder))}
    recipe = recipe.model_copy(
        update={"adapters": adapters, "train": recipe.train.model_copy(update={"gradient_checkpointing": False})}
    )
    saved = {
        name: read_adapter(str(wanted.path), f"adapters.{name}.path", head=name == "reward")
        for name, wanted in adapters.items()
    }
    base = load_base(recipe.base, template.tokenizer, device)
    roles = load_roles(recipe, base, saved, _quiet)
    scores = torch.empty(len(rows))
    collated = partial(collate_units, rows, pad_id=template.pad_id)
    for found, places in held_out(
        roles, rows, collated, partial(roles.last_scores, "reward"), MICRO_TOKENS, "scoring", emit
    ):
        scores[places] = found.cpu()
    lengths = torch.tensor([rows.trained_of(row) for row in range(len(rows))])
    told = [_response(rows, row, float(scores[row]), pairs, template) for row in range(len(rows))]
    return told, PairScores(scores[::2], scores[1::2], lengths[::2], lengths[1::2]) if pairs else None


def reward_run(run: Path) -> tuple[settings.Recipe, Path]:
    """The recipe and folder of the run, or of the reward stage of a chain."""
    facts = _object(run / "run.json")
    recipe = facts.get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"{run} is no run folder: it holds no run.json that can be read")
    if isinstance(recipe.get("stages"), list):
        folders = sorted(run.glob("[0-9]*-*"))
        stages = [
            folder for folder in folders if inside(_object(folder / "run.json"), "recipe").get("algorithm") == "reward"
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


def _rows(recipe: settings.Recipe, file: str, template: Template, emit: Emit) -> tuple[Prepared, bool]:
    source = settings.Source(dataset=file)
    pairs = shape_of(source, read(source, 0)) == "preference"
    data = settings.Data(
        train=(source,),
        validation_share=0.0,
        system=recipe.data.system,
        max_length=recipe.data.max_length,
        max_rejected_share=1.0,
    )
    loaded = load(data, template, 0, emit, pairs=pairs)
    for line in loaded.report.lines():
        if "; dropped " in line:
            emit(Note(message=line, level="warning"))
    return loaded, pairs


def _response(rows: TokenStore, number: int, score: float, pairs: bool, template: Template) -> Response:
    row: Row = rows[number]
    start = list(row.says).index(True)
    prompt, text = (template.decode([int(token) for token in ids]) for ids in (row.ids[:start], row.ids[start:]))
    side = ("chosen", "rejected")[number % 2] if pairs else ""
    return Response(rows.place_of(number), prompt.strip(), text.strip(), rows.trained_of(number), score, side)


def inside(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in a file that anyone may have edited."""
    found = data.get(name)
    return found if isinstance(found, Mapping) else {}


def _object(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _quiet(event: object) -> None:
    pass
