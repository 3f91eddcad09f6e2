"""Prompts that completions are generated for, with the rows that they come from, and which of them are in each step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.config import DataConfig, SourceConfig, TrainingConfig
from lowrank_tune.data.encode import conversation_of
from lowrank_tune.data.formats import Conversation, InvalidRow, RawRowOrFault
from lowrank_tune.data.report import Report, SourceReport, describe_mixture
from lowrank_tune.data.sampler import BatchSampler
from lowrank_tune.data.sources import Chunk, RowLocation, read_source
from lowrank_tune.data.store_writer import conversation_hash
from lowrank_tune.data.templates.chat_template import ChatTemplate
from lowrank_tune.data.tokenize import chunks, format_of, warn_about_missing_rows
from lowrank_tune.events import Emit, LogMessage, Progress

MISSING_ANSWER = "no gold answer, which a reward compares with"
RESAMPLE_SEED_TAG = 3
"""A tag beside those of `sampler`, which separates the random streams."""


@dataclass(frozen=True)
class PromptExample:
    """A prompt as ids, its last message as text, the gold answer if the row has one, and the row."""

    input_ids: Sequence[int]
    text: str
    ground_truth: str | None
    row: Mapping[str, Any]
    answer: str | None = None
    """The text of the row's own answer, if it has one."""


RowFault = Callable[[PromptExample], str | None]
"""Returns why no reward can score the completions of a row; None if it can."""


@dataclass(frozen=True)
class PromptReport(Report):
    """The report of rows of which only the prompts are used: all counts and tokens are those of prompts."""

    @property
    def unit(self) -> str:
        return "prompt"

    def _source_counts(self, source: SourceReport) -> str:
        counts = f"prompts of {source.used} of {source.read} rows, "
        return counts + f"{source.tokens} tokens, {source.ground_truths} with a gold answer"

    def _total(self) -> str:
        total = f"{self.train_rows} prompts to draw completions for"
        if self.duplicates:
            total += f", {self.duplicates} of them repeat an earlier one"
        return total


@dataclass(frozen=True)
class PromptDataset:
    """The prompts of all sources, in their order: `source_of` (N,), `lengths` (N,) in tokens, and the location of the
    row of each."""

    examples: list[PromptExample]
    locations: list[RowLocation]
    source_of: NDArray[np.int32]
    lengths: NDArray[np.int64]
    report: PromptReport

    def __len__(self) -> int:
        return len(self.examples)


class PromptSampler(BatchSampler):
    """The prompts of each step (`train.prompts_per_step`), and replacements for those without a signal."""

    def __init__(
        self,
        dataset: PromptDataset,
        data: DataConfig,
        train: TrainingConfig,
        seed: int,
    ) -> None:
        weights = [source.weight for source in data.train]
        by_prompts = train.model_copy(
            update={
                "global_batch_size": train.prompts_per_step,
                "tokens_per_step": None,
                "length_window": 1,
            }
        )
        super().__init__(
            dataset.lengths,
            dataset.source_of,
            weights,
            by_prompts,
            seed,
        )
        counts = np.bincount(dataset.source_of, minlength=len(weights))
        share_of_source = np.ones(len(weights))
        for number, weight in enumerate(weights):
            if weight is not None:
                share_of_source[number] = weight / counts[number]
        self._shares = share_of_source[dataset.source_of]

    def replacement_prompts(
        self,
        step: int,
        draw: int,
        count: int,
    ) -> list[int]:
        """Returns `count` prompts that are not of this step, by the weights of the sources; those of the step only if
        there are no others left.

        A pure function of the seed, the step and the draw.
        """
        rng = self._random(RESAMPLE_SEED_TAG, step, draw)
        own = np.array(self.rows(step))
        # In the order of exponential times with these rates, prompts are drawn by weight, each at most once.
        times = rng.exponential(size=len(self._shares)) / self._shares
        times[own] += times.max() + 1.0
        queue = np.argsort(times, kind="stable")
        return [int(queue[index % len(queue)]) for index in range(count)]


def load_prompts(
    data: DataConfig,
    template: ChatTemplate,
    seed: int,
    emit: Emit,
    raise_on_invalid: bool = True,
    needs_ground_truth: bool = False,
    unusable: RowFault | None = None,
) -> PromptDataset:
    """Returns the prompts of all training sources; with `needs_ground_truth` only those with a gold answer to compare
    with, and with `unusable` only those without a fault.

    Raises UserError if too few rows of a source have a prompt. Without `raise_on_invalid` these rows are only reported,
    however many.
    """
    reader = _PromptReader(
        data,
        template,
        needs_ground_truth,
        unusable,
    )
    source_of: list[int] = []
    reports: list[SourceReport] = []
    for number, source in enumerate(data.train):
        report = reader.read(source, seed, emit)
        if raise_on_invalid:
            report.check(data.max_invalid_fraction)
        warn_about_missing_rows(source, report, emit)
        source_of += [number] * report.used
        reports.append(report)
    num_prompts = len(reader.examples)
    prompt_report = PromptReport(
        tuple(reports),
        train_rows=num_prompts,
        duplicates=num_prompts - len(reader.hashes),
        mixture=describe_mixture(data.train, [report.used for report in reports], "prompt"),
    )
    lengths = [len(example.input_ids) for example in reader.examples]
    return PromptDataset(
        reader.examples,
        reader.locations,
        np.array(source_of, dtype=np.int32),
        np.array(lengths, dtype=np.int64),
        prompt_report,
    )


class _PromptReader:
    """Reads the prompts of sources, one after the other."""

    def __init__(
        self,
        data: DataConfig,
        template: ChatTemplate,
        needs_ground_truth: bool,
        unusable: RowFault | None,
    ) -> None:
        self.examples: list[PromptExample] = []
        self.locations: list[RowLocation] = []
        self.hashes: set[int] = set()
        self._data = data
        self._template = template
        self._needs_ground_truth = needs_ground_truth
        self._unusable = unusable

    def read(
        self,
        source: SourceConfig,
        seed: int,
        emit: Emit,
    ) -> SourceReport:
        """Adds the prompts of a source to those of the others. Returns its report."""
        rows = read_source(source, seed)
        format_name = format_of(source, rows, pairs=False)
        label = f"reading the prompts of {rows.name}"
        emit(LogMessage(message=f"{rows.name}: {len(rows)} rows in format `{format_name}`"))
        report = SourceReport(
            rows.name,
            format_name,
            weight=source.weight,
        )
        source_hashes: set[int] = set()
        for chunk, total in chunks(rows, report):
            emit(
                Progress(
                    description=label,
                    done=report.read,
                    total=total,
                )
            )
            self._read_chunk(
                chunk,
                source,
                report,
                source_hashes,
            )
        self.hashes |= source_hashes
        emit(
            Progress(
                description=label,
                done=report.read,
                total=report.read,
            )
        )
        assert report.used + report.num_dropped == report.read
        return report

    def _read_chunk(
        self,
        chunk: Chunk,
        source: SourceConfig,
        report: SourceReport,
        hashes: set[int],
    ) -> None:
        """Adds the prompts of a chunk, and counts its rows. Adds the hashes of the prompts to `hashes`."""
        conversations = [self._conversation(raw, source, report.format) for _, raw in chunk]
        usable = [conversation for conversation in conversations if isinstance(conversation, Conversation)]
        prompts = iter(
            self._template.prompt_many(
                [conversation.prompt for conversation in usable],
                [conversation.tools for conversation in usable],
            )
        )
        report.read += len(chunk)
        for (location, raw), conversation in zip(chunk, conversations, strict=True):
            try:
                if isinstance(conversation, InvalidRow):
                    raise conversation
                example = self._example(
                    raw,
                    conversation,
                    next(prompts),
                    report,
                )
            except InvalidRow as fault:
                report.count_dropped(fault.reason, str(location))
                continue
            prompt_hash = conversation_hash(conversation.prompt, conversation.tools)
            report.used += 1
            report.ground_truths += example.ground_truth is not None
            report.tokens += len(example.input_ids)
            report.duplicates += prompt_hash in hashes
            hashes.add(prompt_hash)
            self.examples.append(example)
            self.locations.append(location)

    def _conversation(
        self,
        raw: RawRowOrFault,
        source: SourceConfig,
        format_name: str,
    ) -> Conversation | InvalidRow:
        try:
            return conversation_of(
                raw,
                source,
                format_name,
                self._data.system_prompt,
                require_answer=False,
            )
        except InvalidRow as fault:
            return fault

    def _example(
        self,
        raw: RawRowOrFault,
        conversation: Conversation,
        input_ids: list[int] | InvalidRow,
        report: SourceReport,
    ) -> PromptExample:
        """Returns the prompt of a row, and counts its length. Raises InvalidRow."""
        if isinstance(input_ids, InvalidRow):
            raise input_ids
        assert not isinstance(raw, InvalidRow)
        report.longest = max(report.longest, len(input_ids))
        if len(input_ids) > self._data.max_prompt_length:
            raise InvalidRow(f"longer than data.max_prompt_length ({self._data.max_prompt_length} tokens)")
        example = PromptExample(
            # An array takes a ninth of the space of a list of these numbers.
            array("i", input_ids),
            conversation.prompt[-1].content,
            conversation.ground_truth,
            raw,
            conversation.answer or None,
        )
        check_rewardable(example, self._needs_ground_truth, self._unusable)
        return example


def check_rewardable(
    example: PromptExample,
    needs_ground_truth: bool,
    unusable: RowFault | None,
) -> None:
    """Raises InvalidRow if the rewards cannot score completions of a prompt: it has no gold answer, or a fault."""
    if needs_ground_truth and example.ground_truth is None:
        raise InvalidRow(MISSING_ANSWER)
    reason = unusable(example) if unusable is not None else None
    if reason is not None:
        raise InvalidRow(reason)
