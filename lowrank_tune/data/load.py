"""From the settings `data` to rows to train on, rows to validate with, held-out prompts, and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import DataConfig, RecipeConfig, SourceConfig
from lowrank_tune.config.yaml import dotted
from lowrank_tune.data.encode import conversation_of, pair_of
from lowrank_tune.data.formats import InvalidRow, RawRowOrFault
from lowrank_tune.data.ground_truth import extract_answer
from lowrank_tune.data.message import Message
from lowrank_tune.data.packing import pack_documents
from lowrank_tune.data.report import Report, describe_mixture
from lowrank_tune.data.sources import BUILTIN_DATASETS, read_source
from lowrank_tune.data.templates.chat_template import ChatTemplate
from lowrank_tune.data.token_store import HashArray, TokenizedDataset
from lowrank_tune.data.tokenize import format_of, tokenize
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, warning


@dataclass(frozen=True)
class TokenizedSplits:
    """Tokenized rows, and the report of all rows. `documents` are the rows of `train` with one unit for each row of the
    data: another store only if `train` has packs."""

    train: TokenizedDataset
    validation: TokenizedDataset | None
    report: Report
    documents: TokenizedDataset


@dataclass(frozen=True)
class Prompt:
    """A question without its answer, the gold answer, and the row that it comes from. `tools`: as in `Conversation`."""

    messages: tuple[Message, ...]
    ground_truth: str | None
    row: Mapping[str, Any]
    tools: str = ""


def load(
    data: DataConfig,
    template: ChatTemplate,
    seed: int,
    emit: Emit,
    cache: Path | None = None,
    raise_on_invalid: bool = True,
    pairs: bool = False,
    labels: bool = False,
) -> TokenizedSplits:
    """Reads and tokenizes the rows (or finds them in the cache), and splits them. Raises UserError, before any
    training, if the data cannot be used.

    With `pairs` the rows are preference pairs, which are never split, and all counts are counts of pairs. With `labels`
    they are answers with a label, of which those to one prompt are on one side of the split. Without `raise_on_invalid`
    rows that cannot be used are only reported, however many, so that `lowrank-tune data` shows all faults.
    """
    for path, message in data.weight_findings():
        raise UserError(f"data.{dotted(path)}: {message}")

    def read(sources: Sequence[SourceConfig]) -> TokenizedDataset:
        return tokenize(
            sources,
            data,
            template,
            seed,
            emit,
            cache,
            raise_on_invalid,
            pairs,
            labels,
        )

    full = read(data.train)
    validation: TokenizedDataset | None
    if data.validation:
        train = full
        validation = read(data.validation)
    else:
        train, validation = _split(
            full,
            data.eval_rows or data.eval_fraction,
            seed,
        )
    if raise_on_invalid:
        _check_weighted_sources(data.train, train)
    report = _report(data, full, train, validation)
    _warn_about_shared_rows(report, emit)
    packed, packing = pack_documents(train, data.max_length, seed)
    return TokenizedSplits(
        packed,
        validation,
        replace(report, packing=packing),
        train,
    )


def _warn_about_shared_rows(report: Report, emit: Emit) -> None:
    if report.shared:
        emit(
            warning(
                f"{report.shared} validation {report.unit}s are also training {report.unit}s; the validation "
                "loss will be too low"
            )
        )


def _split(
    full: TokenizedDataset,
    size: float,
    seed: int,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Returns the units to train on and those held out for validation, by `split_mask`."""
    if not size:
        return full, None
    is_validation = split_mask(full.unit_split_hashes, size, seed)
    train = full.select_units(np.flatnonzero(~is_validation))
    if not is_validation.any():
        return train, None
    return train, full.select_units(np.flatnonzero(is_validation))


def _check_weighted_sources(sources: Sequence[SourceConfig], train: TokenizedDataset) -> None:
    """Raises UserError if a source with a weight has no training rows."""
    for number, source in enumerate(sources):
        if source.weight is not None and not (train.source_of == number).any():
            raise UserError(
                f"{train.reports[number].name}: all of its rows went into the validation part; give it more rows or "
                f"no weight"
            )


def _report(
    data: DataConfig,
    full: TokenizedDataset,
    train: TokenizedDataset,
    validation: TokenizedDataset | None,
) -> Report:
    # A store in the cache may have been made with other weights.
    train_reports = []
    for source_report, source in zip(full.reports, data.train, strict=True):
        train_reports.append(replace(source_report, weight=source.weight))
    units_of_source = np.bincount(train.unit_source_of, minlength=len(data.train))
    report = Report(
        train=tuple(train_reports),
        expected_tokens=data.expected_tokens,
        train_rows=train.units,
        duplicates=full.units - len(np.unique(full.unit_hashes)),
        mixture=describe_mixture(data.train, units_of_source.tolist(), "row"),
    )
    if validation is None:
        return report
    return replace(
        report,
        validation=tuple(validation.reports) if data.validation else (),
        validation_rows=validation.units,
        shared=int(np.isin(validation.unit_hashes, train.unit_hashes).sum()),
    )


def load_heldout_prompts(
    source: SourceConfig,
    count: int,
    seed: int,
    system: str | None = None,
) -> list[Prompt]:
    """Returns up to `count` prompts of a source, drawn with the seed. Rows that cannot be used are skipped. Raises
    UserError if no row can be used."""
    if source.dataset in BUILTIN_DATASETS:
        source = source.model_copy(update={"max_samples": source.max_samples or count})
    # More rows than prompts, because some may be unusable.
    max_rows = count + count // 4 + 20
    if source.max_samples:
        max_rows = min(source.max_samples, max_rows)
    rows = read_source(source.model_copy(update={"max_samples": max_rows}), seed)
    format_name = format_of(source, rows)
    prompts: list[Prompt] = []
    faults: list[str] = []
    for location, raw in rows:
        try:
            prompt = to_heldout_prompt(
                raw,
                source,
                format_name,
                system,
            )
        except InvalidRow as fault:
            faults.append(f"{location}: {fault.reason}")
        else:
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"{rows.name}: no row can serve as a prompt: {'; '.join(faults[:3])}")
    return prompts[:count]


def accepted_prompts(prompts: Sequence[Prompt], template: ChatTemplate) -> list[Prompt]:
    """Returns the prompts that the chat template accepts."""
    encoded = template.prompt_many([prompt.messages for prompt in prompts], [prompt.tools for prompt in prompts])
    return [prompt for prompt, ids in zip(prompts, encoded, strict=True) if not isinstance(ids, InvalidRow)]


def recipe_heldout_prompts(recipe: RecipeConfig) -> list[Prompt]:
    """Returns the prompts of `evaluate.eval_dataset`; none without it. Raises UserError if no row can be used."""
    config = recipe.evaluate
    if config.eval_dataset is None:
        return []
    return load_heldout_prompts(
        config.eval_dataset,
        config.num_prompts,
        recipe.seed,
        recipe.data.system_prompt,
    )


def to_heldout_prompt(
    raw: RawRowOrFault,
    source: SourceConfig,
    format_name: str,
    system: str | None,
) -> Prompt:
    """Returns the prompt of a row. The gold answer of a pair is in the chosen answer. Raises InvalidRow."""
    if isinstance(raw, InvalidRow):
        raise raw
    if format_name == "preference":
        pair = pair_of(raw, source, system)
        ground_truth = extract_answer(
            raw,
            source.columns,
            source.ground_truth,
            pair.chosen[-1].content,
            accept_bare_number=True,
        )
        return Prompt(
            pair.prompt,
            ground_truth,
            raw,
            pair.tools,
        )
    conversation = conversation_of(
        raw,
        source,
        format_name,
        system,
        require_answer=False,
    )
    return Prompt(
        conversation.prompt,
        conversation.ground_truth,
        raw,
        conversation.tools,
    )


def split_mask(
    keys: HashArray,
    size: float,
    seed: int,
) -> NDArray[np.bool_]:
    """Returns which rows are held out: a number of them (`size` from 1), or about a share; at least one and never all.

    `keys` are equal for equal conversations, which are all on one side. So the number may not be met exactly.
    """
    unique, group_of, sizes = np.unique(
        keys,
        return_inverse=True,
        return_counts=True,
    )
    if len(unique) < 2:
        return np.zeros(len(keys), dtype=bool)
    if size < 1:
        size *= len(keys)
    ranking = np.argsort(_hash_keys(unique, seed), kind="stable")
    ranked_sizes = sizes[ranking]
    rows_before = np.cumsum(ranked_sizes) - ranked_sizes
    # A group is held out if at least half of it fits.
    num_fitting = int((rows_before + ranked_sizes / 2 <= size).sum())
    num_groups = min(max(1, num_fitting), len(unique) - 1)
    is_validation = np.zeros(len(unique), dtype=bool)
    is_validation[ranking[:num_groups]] = True
    return np.asarray(is_validation[group_of])


def _hash_keys(keys: HashArray, seed: int) -> HashArray:
    """Returns another order of the keys for every seed: the finalizer of splitmix64, whose products wrap around."""
    offset = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
    mixed = keys ^ np.uint64(offset)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        shifted = mixed >> np.uint64(shift)
        mixed = (mixed ^ shifted) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
