"""Prompts that completions are drawn for: read whole, with the rows that they come from, and which of them make up each
step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import DataConfig, SourceConfig, TrainingConfig
from lowrank_tune.data.chat_template import ChatTemplate
from lowrank_tune.data.files import RawExample
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.message import Message
from lowrank_tune.data.report import Report, SourceReport
from lowrank_tune.data.sampler import BatchSampler
from lowrank_tune.data.sources import RowLocation, read_source
from lowrank_tune.data.token_store import conversation_hash
from lowrank_tune.data.tokenize import check_enough_rows, conversation, format_of
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, Progress

PROGRESS_EVERY = 2048  # rows between two reports of progress
MISSING_ANSWER = "no gold answer, which a reward compares with"
RESAMPLE_SEED_TAG = 3  # a tag beside those of `mixture`, which keeps the random streams apart


@dataclass(frozen=True)
class PromptExample:
    """A prompt as ids and as a person reads it, the gold answer where there is one, and the row that it comes from."""

    input_ids: Sequence[int]
    text: str
    ground_truth: str | None
    row: Mapping[str, Any]
    answer: str | None = None
    """The row's own answer, where it has one."""


@dataclass(frozen=True)
class PromptReport(Report):
    """What became of the rows where only their prompts are used: all that is counted are prompts, and tokens are
    theirs."""

    @property
    def unit(self) -> str:
        return "prompt"

    def lines(self) -> list[str]:
        """As sentences, one a source and one for the whole."""
        lines = []
        for source in self.train:
            line = (
                f"{source.name} ({source.format}): prompts of {source.used} of {source.read} rows, "
                f"{source.tokens} tokens, "
            )
            line += f"{source.ground_truths} with a gold answer"
            lines.append(line + (f"; dropped {source.reasons()}" if source.dropped else ""))
        if self.duplicates:
            repeated = f", {self.duplicates} of them repeat an earlier one"
        else:
            repeated = ""
        return [*lines, f"{self.train_rows} prompts to draw completions for{repeated}; {self.mixture}"]


@dataclass(frozen=True)
class PromptDataset:
    """The prompts of all sources, in their order: `source_of` (N,), `lengths` (N,) in tokens, and where the row of each
    stands."""

    examples: list[PromptExample]
    locations: list[RowLocation]
    source_of: NDArray[np.int32]
    lengths: NDArray[np.int64]
    report: PromptReport

    def __len__(self) -> int:
        return len(self.examples)


class PromptSampler(BatchSampler):
    """Which prompts make up each step, and which others can take the place of those that teach nothing."""

    def __init__(self, dataset: PromptDataset, data: DataConfig, train: TrainingConfig, seed: int) -> None:
        given = [source.weight for source in data.train]
        by_prompts = train.model_copy(
            update={"global_batch_size": train.prompts_per_step, "tokens_per_step": None, "length_window": 1}
        )
        super().__init__(dataset.lengths, dataset.source_of, given, by_prompts, seed)
        counts = np.bincount(dataset.source_of, minlength=len(given))
        share_of = np.array(
            [1.0 if weight is None else weight / count for weight, count in zip(given, counts, strict=True)]
        )
        self._shares = share_of[dataset.source_of]

    def replacement_prompts(self, step: int, draw: int, count: int) -> list[int]:
        """`count` prompts that are not of this step, by the weights of the sources; its own again only where there are
        no more others.

        A pure function of the seed, the step and the draw.
        """
        rng = self._random(RESAMPLE_SEED_TAG, step, draw)
        own = np.array(self.rows(step))
        # The smallest of exponential times at these rates: drawn by weight, each at most once.
        times = rng.exponential(size=len(self._shares)) / self._shares
        times[own] += times.max() + 1.0
        queue = np.argsort(times, kind="stable")
        return [int(queue[index % len(queue)]) for index in range(count)]


def make_prompt_sampler(dataset: PromptDataset, data: DataConfig, train: TrainingConfig, seed: int) -> PromptSampler:
    """The order of these prompts, `train.prompts_per_step` a step."""
    return PromptSampler(dataset, data, train, seed)


def load_prompts(
    data: DataConfig,
    template: ChatTemplate,
    seed: int,
    emit: Emit,
    raise_on_invalid: bool = True,
    needs_ground_truth: bool = False,
    unusable: Callable[[PromptExample], str | None] | None = None,
) -> PromptDataset:
    """The prompts of all training sources; with `needs_ground_truth` those alone that have a gold answer to compare
    with. `unusable` says of a row why no reward could judge by it.

    Raises `UserError` where too many rows of one source give none. Without `raise_on_invalid` these rows are only
    reported, however many.
    """
    examples: list[PromptExample] = []
    locations: list[RowLocation] = []
    source_of: list[int] = []
    hashes: set[int] = set()
    reports: list[SourceReport] = []
    for number, source in enumerate(data.train):
        report = _load_source(
            source,
            data,
            template,
            seed,
            emit,
            needs_ground_truth,
            unusable,
            examples,
            locations,
            hashes,
        )
        if raise_on_invalid:
            report.check(data.max_invalid_fraction)
        if warning := check_enough_rows(source, report):
            emit(LogMessage(message=warning, level="warning"))
        source_of += [number] * report.used
        reports.append(report)
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    prompt_report = PromptReport(
        tuple(reports),
        train_rows=len(examples),
        duplicates=len(examples) - len(hashes),
        mixture=_mixture(data.train, reports),
    )
    return PromptDataset(examples, locations, np.array(source_of, dtype=np.int32), lengths, prompt_report)


def _load_source(
    source: SourceConfig,
    data: DataConfig,
    template: ChatTemplate,
    seed: int,
    emit: Emit,
    needs_ground_truth: bool,
    unusable: Callable[[PromptExample], str | None] | None,
    examples: list[PromptExample],
    locations: list[RowLocation],
    hashes: set[int],
) -> SourceReport:
    """Adds the prompts of one source to those of the others."""
    rows = read_source(source, seed)
    format_name = format_of(source, rows, pairs=False)
    emit(LogMessage(message=f"{rows.name}: {len(rows)} rows of the shape `{format_name}`"))
    report = SourceReport(rows.name, format_name, weight=source.weight)
    source_hashes: set[int] = set()
    for location, raw in chain.from_iterable(rows.refill_dropped(lambda: report.used)):
        if report.read % PROGRESS_EVERY == 0:
            emit(Progress(description=f"reading the prompts of {rows.name}", done=report.read, total=len(rows)))
        report.read += 1
        result = (
            raw if isinstance(raw, InvalidRow) else _to_prompt_example(raw, source, format_name, data, template, report)
        )
        if not isinstance(result, InvalidRow) and needs_ground_truth and result[0].ground_truth is None:
            result = InvalidRow(MISSING_ANSWER)
        if not isinstance(result, InvalidRow) and unusable is not None and (reason := unusable(result[0])) is not None:
            result = InvalidRow(reason)
        if isinstance(result, InvalidRow):
            report.count_dropped(result.reason, str(location))
            continue
        example, row_hash = result
        _count(report, example, row_hash in source_hashes)
        source_hashes.add(row_hash)
        examples.append(example)
        locations.append(location)
    hashes |= source_hashes
    emit(Progress(description=f"reading the prompts of {rows.name}", done=report.read, total=len(rows)))
    assert report.used + report.num_dropped == report.read
    return report


def _count(report: SourceReport, example: PromptExample, is_known: bool) -> None:
    report.used += 1
    report.ground_truths += example.ground_truth is not None
    report.tokens += len(example.input_ids)
    report.duplicates += is_known


def _to_prompt_example(
    raw: RawExample,
    source: SourceConfig,
    format_name: str,
    data: DataConfig,
    template: ChatTemplate,
    report: SourceReport,
) -> tuple[PromptExample, int] | InvalidRow:
    """The prompt of a row and a number for it, or why it gives none."""
    chat = conversation(raw, source, format_name, data.system_prompt, require_answer=False)
    if isinstance(chat, InvalidRow):
        return chat
    if chat.messages[-1].role == "assistant":
        messages = chat.messages[:-1]
    else:
        messages = chat.messages
    ids = _ids(messages, template)
    if isinstance(ids, InvalidRow):
        return ids
    report.longest = max(report.longest, len(ids))
    if len(ids) > data.max_prompt_length:
        return InvalidRow(f"longer than data.max_prompt_length ({data.max_prompt_length} tokens)")
    # An array, for a list of as many numbers is nine times as large.
    if chat.messages[-1].role == "assistant":
        answer = chat.messages[-1].content
    else:
        answer = None
    return PromptExample(array("i", ids), messages[-1].content, chat.ground_truth, raw, answer), conversation_hash(
        messages
    )


def _ids(messages: Sequence[Message], template: ChatTemplate) -> list[int] | InvalidRow:
    """What the base reads, or why it cannot be asked this: what `ChatTemplate.validate_messages` says, for half the
    time of asking both."""
    try:
        return template.prompt(messages)
    except UserError as error:
        if isinstance(error.__cause__, InvalidRow):
            return error.__cause__
        return InvalidRow(str(error))


def _mixture(sources: Sequence[SourceConfig], reports: Sequence[SourceReport]) -> str:
    if len(sources) == 1:
        return "one source"
    total = max(1, sum(report.used for report in reports))
    shares = [
        f"{source.dataset} {100 * (source.weight or report.used / total):.3g} %"
        for source, report in zip(sources, reports, strict=True)
    ]
    return f"mixed by {'weight' if sources[0].weight is not None else 'prompt counts'}: {', '.join(shares)}"
