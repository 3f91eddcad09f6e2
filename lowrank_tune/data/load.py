"""The door of this floor: from the data settings to rows to train on, rows to validate with, prompts, and a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data.chat_template import ChatTemplate
from lowrank_tune.data.encode_pairs import pair_of
from lowrank_tune.data.files import RawExample
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.ground_truth import extract_answer
from lowrank_tune.data.message import Message
from lowrank_tune.data.report import Report
from lowrank_tune.data.sources import BUILTIN_DATASETS, read_source
from lowrank_tune.data.token_store import TokenizedDataset
from lowrank_tune.data.tokenize import conversation, format_of, tokenize
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage


@dataclass(frozen=True)
class TokenizedSplits:
    """Tokenized rows and what became of the others."""

    train: TokenizedDataset
    validation: TokenizedDataset | None
    report: Report


@dataclass(frozen=True)
class Prompt:
    """A question without its answer, the gold answer, and the row that it comes from."""

    messages: tuple[Message, ...]
    ground_truth: str | None
    row: Mapping[str, Any]


def load(
    data: DataConfig,
    template: ChatTemplate,
    seed: int,
    emit: Emit,
    cache: Path | None = None,
    raise_on_invalid: bool = True,
    pairs: bool = False,
) -> TokenizedSplits:
    """Reads, tokenizes (or finds again) and splits. Raises `UserError`, before any training, where the data cannot be
    used.

    With `pairs` the rows are preference pairs, which are never parted. All that is counted are then pairs. Without
    `raise_on_invalid` rows that cannot be used are only reported, however many: a preflight shows all of it before it
    says no.
    """
    _check_weights(data.train)
    full = tokenize(data.train, data, template, seed, emit, cache, raise_on_invalid, pairs)
    validation = None
    train = full
    if data.validation:
        validation = tokenize(data.validation, data, template, seed, emit, cache, raise_on_invalid, pairs)
    elif data.eval_rows or data.eval_fraction:
        is_validation = split_mask(full.unit_hashes, data.eval_rows or data.eval_fraction, seed)
        train = full.select_units(np.flatnonzero(~is_validation))
        if is_validation.any():
            validation = full.select_units(np.flatnonzero(is_validation))
        else:
            validation = None
    weighted = [source for source, given in enumerate(data.train) if given.weight is not None]
    for source in weighted:
        if raise_on_invalid and not (train.source_of == source).any():
            raise UserError(
                f"{full.reports[source].name}: all of its rows went into the validation part; give it more rows or "
                f"no weight"
            )
    if validation is not None:
        shared = int(np.isin(validation.unit_hashes, train.unit_hashes).sum())
    else:
        shared = 0
    report = Report(
        train=tuple(
            replace(source_report, weight=given.weight)
            for source_report, given in zip(full.reports, data.train, strict=True)
        ),
        validation=tuple(validation.reports) if validation is not None and data.validation else (),
        expected_tokens=data.expected_tokens,
        train_rows=train.units,
        validation_rows=0 if validation is None else validation.units,
        duplicates=full.units - len(np.unique(full.unit_hashes)),
        shared=shared,
        mixture=_mixture(data.train, train),
    )
    if shared:
        emit(
            LogMessage(
                level="warning",
                message=f"{shared} validation {report.unit}s also stand in the training {report.unit}s; the "
                f"validation loss "
                "will flatter",
            )
        )
    return TokenizedSplits(train, validation, report)


def load_heldout_prompts(source: SourceConfig, count: int, seed: int, system: str | None = None) -> list[Prompt]:
    """Up to `count` prompts of a source, drawn with the seed. Rows that cannot be used are passed over."""
    if source.dataset in BUILTIN_DATASETS:
        source = source.model_copy(update={"max_samples": source.max_samples or count})
    spare = count + count // 4 + 20  # some rows may be unusable
    max_rows = min(source.max_samples or spare, spare)
    rows = read_source(source.model_copy(update={"max_samples": max_rows}), seed)
    format_name = format_of(source, rows)
    selected: list[Prompt] = []
    errors: list[str] = []
    for location, raw in rows:
        prompt = raw if isinstance(raw, InvalidRow) else to_heldout_prompt(raw, source, format_name, system)
        if isinstance(prompt, InvalidRow):
            errors.append(f"{location}: {prompt.reason}")
        else:
            selected.append(prompt)
    if not selected:
        raise UserError(f"{rows.name}: no row can serve as a prompt: {'; '.join(errors[:3])}")
    return selected[:count]


def to_heldout_prompt(
    raw: RawExample,
    source: SourceConfig,
    format_name: str,
    system: str | None,
) -> Prompt | InvalidRow:
    """The prompt of a row; of a pair the gold answer stands in the chosen side."""
    if format_name == "preference":
        pair = pair_of(raw, source, system)
        if isinstance(pair, InvalidRow):
            return pair
        return Prompt(
            pair.prompt,
            extract_answer(raw, source.columns, source.ground_truth, pair.chosen[-1].content, accept_bare_number=True),
            raw,
        )
    chat = conversation(raw, source, format_name, system, require_answer=False)
    if isinstance(chat, InvalidRow):
        return chat
    return Prompt(
        chat.messages[:-1] if chat.messages[-1].role == "assistant" else chat.messages,
        chat.ground_truth,
        raw,
    )


def split_mask(keys: NDArray[np.uint64], size: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are set aside: a whole number of them, or about a share; at least one and never all. Equal
    conversations go to one side, so that a number may be missed where there are some."""
    unique, group_of, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        return np.zeros(len(keys), dtype=bool)
    ranking = np.argsort(_hash_keys(unique, seed), kind="stable")
    size = size if size >= 1 else size * len(keys)
    before = np.cumsum(sizes[ranking]) - sizes[ranking]
    groups = ranking[: min(max(1, int((before + sizes[ranking] / 2 <= size).sum())), len(unique) - 1)]
    is_validation = np.zeros(len(unique), dtype=bool)
    is_validation[groups] = True
    return np.asarray(is_validation[group_of])


def _hash_keys(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A different order of the keys for every seed (the finaliser of splitmix64, which wraps around)."""
    mixed = keys ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _check_weights(sources: Sequence[SourceConfig]) -> None:
    given = [source.weight for source in sources if source.weight is not None]
    if given and (len(given) < len(sources) or not math.isclose(sum(given), 1.0, abs_tol=1e-6)):
        raise UserError(
            "data.train: either every source has a weight, and they sum to 1, or none has; "
            f"{len(given)} of {len(sources)} have one, and they sum to {sum(given):g}"
        )


def _mixture(sources: Sequence[SourceConfig], train: TokenizedDataset) -> str:
    if len(sources) == 1:
        return "one source"
    counts = np.bincount(train.source_of, minlength=len(sources))
    shares = [
        f"{source.dataset} {100 * (source.weight or counts[index] / len(train)):.3g} %"
        for index, source in enumerate(sources)
    ]
    return f"mixed by {'weight' if sources[0].weight is not None else 'row counts'}: {', '.join(shares)}"
