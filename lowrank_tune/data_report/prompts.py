"""The report of prompts that completions are generated for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_tune.config import RecipeConfig
from lowrank_tune.data import ChatTemplate, Prompt
from lowrank_tune.data.prompts import PromptDataset, PromptSampler
from lowrank_tune.data_report.common import (
    LEAKAGE,
    LEAKAGE_NOTE,
    SHOWN_CHARACTERS,
    Units,
    can_be_drawn,
    dropped_rows,
    example_rows,
    first_few,
    heldout_ids,
    invalid_sources,
    lengths_of,
    mixture_of,
    truncate_middle,
    weighted_by,
)
from lowrank_tune.data_report.report import (
    DataIssue,
    DataReport,
    Epoch,
    Example,
    MixturePart,
)


def report_prompts(
    recipe: RecipeConfig,
    dataset: PromptDataset,
    template: ChatTemplate,
    heldout: Sequence[Prompt] = (),
) -> DataReport:
    """Returns the report of loaded prompts."""
    parts, epoch = _mixture(recipe, dataset)
    rollout = recipe.rollout
    return DataReport(
        report=dataset.report,
        template=template.describe(),
        weighted_by=weighted_by(recipe.data.train, "prompt"),
        parts=parts,
        lengths=lengths_of(dataset.lengths, dataset.report, recipe.data.max_prompt_length),
        issues=tuple(_issues(dataset, template, heldout)),
        ends=None,
        epoch=epoch,
        examples=tuple(_examples(dataset, template)),
        faults=tuple(invalid_sources(dataset.report, recipe)),
        completions=(
            f"{rollout.num_generations:,} completions of each prompt, of up to {rollout.max_new_tokens:,} tokens"
        ),
    )


def _mixture(recipe: RecipeConfig, dataset: PromptDataset) -> tuple[tuple[MixturePart, ...], Epoch]:
    """Returns the mixture of prompts, of which no token is trained."""
    units = Units(
        dataset.source_of,
        dataset.lengths,
        np.zeros_like(dataset.lengths),
    )
    sampler = None
    if can_be_drawn(units, recipe):
        sampler = PromptSampler(
            dataset,
            recipe.data,
            recipe.train,
            recipe.seed,
        )
    return mixture_of(
        recipe,
        dataset.report.train,
        units,
        sampler,
    )


def _issues(
    dataset: PromptDataset,
    template: ChatTemplate,
    heldout: Sequence[Prompt],
) -> list[DataIssue]:
    """Returns every kind of issue, even if no prompt has it."""
    unanswered: list[int] = []
    repeated: list[int] = []
    leaked: list[int] = []
    seen: set[tuple[int, ...]] = set()
    known_ids = heldout_ids(heldout, template)
    for index, example in enumerate(dataset.examples):
        ids = tuple(example.input_ids)
        if example.ground_truth is None:
            unanswered.append(index)
        if ids in seen:
            repeated.append(index)
        if ids in known_ids:
            leaked.append(index)
        seen.add(ids)
    issues = dropped_rows(dataset.report.train, ("too long",))
    issues.append(
        _issue(
            dataset,
            "without a gold answer",
            unanswered,
            "kept",
        )
    )
    issues.append(
        _issue(
            dataset,
            "repeating an earlier prompt",
            repeated,
            "kept; completions are drawn for each copy",
        )
    )
    if heldout:
        issues.append(
            _issue(
                dataset,
                LEAKAGE,
                leaked,
                LEAKAGE_NOTE,
            )
        )
    return issues


def _issue(
    dataset: PromptDataset,
    description: str,
    indices: Sequence[int],
    done: str,
) -> DataIssue:
    locations = first_few(str(dataset.locations[index]) for index in indices)
    return DataIssue(
        description,
        len(indices),
        done,
        locations,
    )


def _examples(dataset: PromptDataset, template: ChatTemplate) -> list[Example]:
    """Returns some prompts with their gold answers."""
    examples = []
    for index in example_rows(dataset.source_of):
        prompt = dataset.examples[index]
        text = template.decode(list(prompt.input_ids), special_tokens=True)
        segment = (False, truncate_middle(text, SHOWN_CHARACTERS))
        location = str(dataset.locations[index])
        examples.append(
            Example(
                location,
                len(prompt.input_ids),
                0,
                (segment,),
                prompt.ground_truth,
            )
        )
    return examples
