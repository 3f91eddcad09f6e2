"""The picture of prompts that completions are drawn for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import ChatTemplate, Prompt
from lowrank_tune.data.prompts import PromptDataset, make_prompt_sampler
from lowrank_tune.data.report import EXAMPLES
from lowrank_tune.data_report.common import (
    LEAKAGE_NOTE,
    SHOWN_CHARACTERS,
    dropped_rows,
    example_rows,
    heldout_ids,
    invalid_sources,
    lengths_of,
    truncate_middle,
    weighted_by,
)
from lowrank_tune.data_report.report import DataIssue, DataReport, Epoch, Example, MixturePart


def report_prompts(
    recipe: RecipeConfig,
    dataset: PromptDataset,
    template: ChatTemplate,
    heldout: Sequence[Prompt] = (),
) -> DataReport:
    """The picture of the prompts that completions are drawn for."""
    parts, epoch = _prompt_mixture(recipe, dataset)
    rollout = recipe.rollout
    return DataReport(
        report=dataset.report,
        template=template.describe(),
        weighted_by=weighted_by(recipe.data.train, "prompt"),
        parts=parts,
        lengths=lengths_of(dataset.lengths, dataset.report, recipe.data.max_prompt_length),
        issues=tuple(_prompt_issues(dataset, template, heldout)),
        ends=None,
        epoch=epoch,
        examples=tuple(_prompt_examples(dataset, template)),
        faults=tuple(invalid_sources(dataset.report, recipe)),
        completions=(
            f"{rollout.num_generations:,} completions of each prompt, of up to {rollout.max_new_tokens:,} tokens"
        ),
    )


def _prompt_mixture(recipe: RecipeConfig, dataset: PromptDataset) -> tuple[tuple[MixturePart, ...], Epoch]:
    """The same of prompts."""
    weights = [source.weight for source in recipe.data.train]
    total = max(1, len(dataset))
    drawn = np.zeros(0, np.int64)
    steps = 0
    all_steps = 0
    if len(dataset) and (weights[0] is None or all(report.used for report in dataset.report.train)):
        sampler = make_prompt_sampler(dataset, recipe.data, recipe.train, recipe.seed)
        drawn = np.concatenate([sampler.rows(step) for step in range(sampler.steps_per_epoch)])
        steps = sampler.steps_per_epoch
        all_steps = recipe.train.max_steps or sampler.steps_of(recipe.train.num_train_epochs or 1.0)
    tokens = np.bincount(dataset.source_of[drawn], weights=dataset.lengths[drawn], minlength=len(weights))
    parts = tuple(
        MixturePart(
            report.name,
            report.format,
            report.read,
            report.used,
            report.ground_truths,
            report.used,
            report.tokens,
            0,
            report.used / total if weight is None else weight,
            int(tokens[number]),
            0,
        )
        for number, (report, weight) in enumerate(zip(dataset.report.train, weights, strict=True))
    )
    return parts, Epoch(len(drawn), int(tokens.sum()), 0, steps, all_steps)


def _prompt_issues(dataset: PromptDataset, template: ChatTemplate, heldout: Sequence[Prompt]) -> list[DataIssue]:
    """The same of prompts. One that repeats an earlier prompt is drawn for more often than others."""
    unanswered = [index for index, example in enumerate(dataset.examples) if example.ground_truth is None]
    seen: set[tuple[int, ...]] = set()
    repeated = []
    leaked = []
    known_ids = heldout_ids(heldout, template)
    for index, ids in enumerate(tuple(example.input_ids) for example in dataset.examples):
        repeated += [index] * (ids in seen)
        leaked += [index] * (ids in known_ids)
        seen.add(ids)
    issues = [
        *dropped_rows(dataset.report.train, ("too long",)),
        DataIssue("without a gold answer", len(unanswered), "kept", _prompt_locations(dataset, unanswered)),
        DataIssue(
            "repeating an earlier prompt",
            len(repeated),
            "kept; drawn for as often as it stands there",
            _prompt_locations(dataset, repeated),
        ),
    ]
    if heldout:
        return [
            *issues,
            DataIssue("asking a held-out question", len(leaked), LEAKAGE_NOTE, _prompt_locations(dataset, leaked)),
        ]
    return issues


def _prompt_locations(dataset: PromptDataset, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(dataset.locations[number]) for number in numbers[:EXAMPLES])


def _prompt_examples(dataset: PromptDataset, template: ChatTemplate) -> list[Example]:
    """The same of prompts, with their gold answers."""
    shown = [(str(dataset.locations[number]), dataset.examples[number]) for number in example_rows(dataset.source_of)]
    return [
        Example(
            location,
            len(example.input_ids),
            0,
            (
                (
                    False,
                    truncate_middle(template.decode(list(example.input_ids), special_tokens=True), SHOWN_CHARACTERS),
                ),
            ),
            example.ground_truth,
        )
        for location, example in shown
    ]
