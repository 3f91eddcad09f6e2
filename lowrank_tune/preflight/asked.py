"""The picture of prompts that completions are drawn for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_tune import settings
from lowrank_tune.data import Prompt, Template
from lowrank_tune.data.asked import AskedSet, asked_order
from lowrank_tune.data.report import EXAMPLES
from lowrank_tune.preflight.common import (
    HEARD,
    SHOWN_CHARACTERS,
    cut,
    dropped,
    ids_of,
    lengths_of,
    picked,
    too_few,
    weighted_by,
)
from lowrank_tune.preflight.picture import Epoch, Example, Part, Preflight, Trouble


def survey_asked(
    recipe: settings.Recipe, found: AskedSet, template: Template, heldout: Sequence[Prompt] = ()
) -> Preflight:
    """The picture of the prompts that completions are drawn for."""
    parts, epoch = _asked_mixture(recipe, found)
    rollout = recipe.rollout
    return Preflight(
        report=found.report,
        template=template.describe(),
        weighted_by=weighted_by(recipe.data.train, "prompt"),
        parts=parts,
        lengths=lengths_of(found.lengths, found.report, recipe.data.max_prompt_length),
        troubles=tuple(_asked_troubles(found, template, heldout)),
        ends=None,
        epoch=epoch,
        examples=tuple(_asked_examples(found, template)),
        faults=tuple(too_few(found.report, recipe)),
        draws=f"{rollout.num_generations:,} completions of each prompt, of up to {rollout.max_new_tokens:,} tokens",
    )


def _asked_mixture(recipe: settings.Recipe, found: AskedSet) -> tuple[tuple[Part, ...], Epoch]:
    """The same of prompts."""
    weights, total = [source.weight for source in recipe.data.train], max(1, len(found))
    drawn, steps, all_steps = np.zeros(0, np.int64), 0, 0
    if len(found) and (weights[0] is None or all(told.used for told in found.report.train)):
        order = asked_order(found, recipe.data, recipe.train, recipe.seed)
        drawn, steps = (
            np.concatenate([order.rows(step) for step in range(order.steps_per_epoch)]),
            order.steps_per_epoch,
        )
        all_steps = recipe.train.steps or order.steps_of(recipe.train.epochs or 1.0)
    tokens = np.bincount(found.source_of[drawn], weights=found.lengths[drawn], minlength=len(weights))
    parts = tuple(
        Part(
            told.name,
            told.format,
            told.read,
            told.used,
            told.golds,
            told.used,
            told.tokens,
            0,
            told.used / total if weight is None else weight,
            int(tokens[number]),
            0,
        )
        for number, (told, weight) in enumerate(zip(found.report.train, weights, strict=True))
    )
    return parts, Epoch(len(drawn), int(tokens.sum()), 0, steps, all_steps)


def _asked_troubles(found: AskedSet, template: Template, heldout: Sequence[Prompt]) -> list[Trouble]:
    """The same of prompts. One that repeats an earlier prompt is drawn for more often than others."""
    golden = [index for index, one in enumerate(found.asked) if one.gold is None]
    seen: set[tuple[int, ...]] = set()
    again, known = [], []
    heard = ids_of(heldout, template)
    for index, ids in enumerate(tuple(one.ids) for one in found.asked):
        again += [index] * (ids in seen)
        known += [index] * (ids in heard)
        seen.add(ids)
    told = [
        *dropped(found.report.train, ("too long",)),
        Trouble("without a gold answer", len(golden), "kept", _asked_places(found, golden)),
        Trouble(
            "repeating an earlier prompt",
            len(again),
            "kept; drawn for as often as it stands there",
            _asked_places(found, again),
        ),
    ]
    return (
        [*told, Trouble("asking a held-out question", len(known), HEARD, _asked_places(found, known))]
        if heldout
        else told
    )


def _asked_places(found: AskedSet, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(found.places[number]) for number in numbers[:EXAMPLES])


def _asked_examples(found: AskedSet, template: Template) -> list[Example]:
    """The same of prompts, with their gold answers."""
    shown = [(str(found.places[number]), found.asked[number]) for number in picked(found.source_of)]
    return [
        Example(
            place,
            len(one.ids),
            0,
            ((False, cut(template.decode(list(one.ids), marks=True), SHOWN_CHARACTERS)),),
            one.gold,
        )
        for place, one in shown
    ]
