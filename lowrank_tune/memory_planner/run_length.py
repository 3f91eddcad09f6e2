"""How much a run computes: its steps, and the tokens that they train on or draw, at least and at most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.data.sources import BUILTIN_DATASETS, is_hub_dataset
from lowrank_tune.data_report import DataReport, inspect_data
from lowrank_tune.errors import UserError
from lowrank_tune.events import ignore_event
from lowrank_tune.model.base_source import BUILTIN_MODEL

MAX_READ_BYTES = 16 << 20
"""Files up to this size are tokenized for an estimate, which takes some seconds."""
SHORTEST_MEAN_SHARE = 0.25
"""Where the rows are unknown, their mean is taken to be at least this part of the maximum length."""
SHORTEST_COMPLETION_SHARE = 0.5
"""Completions are taken to have at least this part of the new tokens that they may have, in the mean."""
DEFAULT_BATCH = 16
"""Rows of a step if the recipe does not set them."""


@dataclass(frozen=True)
class Span:
    """At least, and at most."""

    low: float
    high: float

    def times(self, factor: float) -> Span:
        return Span(self.low * factor, self.high * factor)

    def plus(self, other: Span) -> Span:
        return Span(self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class RunLength:
    """The length of a run. `tokens` are those of all rows in all `epochs`, of both answers of a pair, of completions
    with their prompts; `new_tokens` those of one completion; `basis` is where the figures are from."""

    steps: float
    tokens: Span
    basis: str
    epochs: float = 1.0
    new_tokens: Span = Span(0.0, 0.0)


def run_length(recipe: RecipeConfig) -> RunLength | None:
    """Returns the length of a run: from its data if these are small files on this machine, else from the settings; None
    if these do not determine the number of rows."""
    fault = ""
    report = None
    if _has_local_tokenizer(recipe.base.model) and all(_is_small(source) for _, source in recipe.sources()):
        try:
            report = inspect_data(recipe, ignore_event)
        except UserError as error:
            fault = f"; the data cannot be counted: {error}"
    length = _online_length(recipe, report) if recipe.is_online else _offline_length(recipe, report)
    if length is None:
        return None
    return replace(length, basis=length.basis + fault)


def _offline_length(recipe: RecipeConfig, report: DataReport | None) -> RunLength | None:
    if report is not None and report.epoch.rows:
        epoch = report.epoch
        tokens = epoch.tokens * epoch.passes
        return RunLength(
            epoch.all_steps,
            Span(tokens, tokens),
            f"{epoch.tokens:,} tokens an epoch, counted in the data",
            epoch.passes,
        )
    return _length_from_settings(recipe)


def _online_length(recipe: RecipeConfig, report: DataReport | None) -> RunLength | None:
    train = recipe.train
    steps: float | None = train.max_steps
    rows = _rows_from_settings(recipe)
    longest_prompt = recipe.data.max_prompt_length
    prompt = Span(longest_prompt * SHORTEST_MEAN_SHARE, longest_prompt)
    basis = f"prompts of at most {longest_prompt:,} tokens"
    if report is not None and report.epoch.rows:
        mean = report.epoch.tokens / report.epoch.rows
        prompt = Span(mean, mean)
        rows = float(report.epoch.rows)
        basis = f"prompts of {mean:,.0f} tokens in the mean, counted in the data"
    if steps is None and rows is not None:
        steps = max(1.0, rows * (train.num_train_epochs or 1.0) / train.prompts_per_step)
    if steps is None:
        return None
    longest = recipe.rollout.max_new_tokens
    new_tokens = Span(longest * SHORTEST_COMPLETION_SHARE, longest)
    completions = steps * train.prompts_per_step * recipe.rollout.num_generations
    return RunLength(
        steps,
        prompt.plus(new_tokens).times(completions),
        f"{completions:,.0f} completions of {new_tokens.low:,.0f} to {longest:,} tokens; {basis}",
        new_tokens=new_tokens,
    )


def _length_from_settings(recipe: RecipeConfig) -> RunLength | None:
    """Returns the length by the number of rows and their maximum length."""
    train = recipe.train
    rows_per_step = train.global_batch_size or DEFAULT_BATCH
    epochs = train.num_train_epochs or 1.0
    if train.max_steps is not None and train.tokens_per_step is not None:
        tokens = float(train.max_steps * train.tokens_per_step)
        return RunLength(train.max_steps, Span(tokens, tokens), "steps of the recipe's tokens")
    rows = _rows_from_settings(recipe)
    if train.max_steps is not None:
        rows = train.max_steps * rows_per_step
    elif rows is not None:
        rows *= epochs
    if rows is None:
        return None
    length = recipe.max_train_length
    sides = 2 if recipe.uses_pairs else 1
    unit = "pairs" if recipe.uses_pairs else "rows"
    shortest = length * SHORTEST_MEAN_SHARE
    basis = f"{rows:,.0f} {unit} of {shortest:,.0f} to {length:,} tokens"
    tokens = rows * sides
    return RunLength(
        rows / rows_per_step,
        Span(tokens * shortest, tokens * length),
        basis,
        epochs,
    )


def _rows_from_settings(recipe: RecipeConfig) -> float | None:
    """Returns the most training rows of an epoch; None if a source has no `max_samples`, or contains plain text, whose
    documents are packed."""
    data = recipe.data
    rows = 0.0
    for source in data.train:
        if source.max_samples is None or source.format == "text":
            return None
        rows += source.max_samples * _answers_per_row(recipe, source)
    if recipe.is_online or data.validation:
        return rows
    if data.eval_rows:
        return max(0.0, rows - data.eval_rows)
    return rows * (1 - data.eval_fraction)


def _answers_per_row(recipe: RecipeConfig, source: SourceConfig) -> int:
    """Returns how many rows are made of a row of a source: with labels, both answers of a pair are rows."""
    is_pair = source.format == "preference" or source.dataset == "builtin:arithmetic-preferences"
    return 2 if recipe.uses_labels and is_pair else 1


def _has_local_tokenizer(model: str) -> bool:
    if model == BUILTIN_MODEL or Path(model).expanduser().is_dir():
        return True
    name, _, revision = model.partition("@")
    cached = try_to_load_from_cache(name, "tokenizer_config.json", revision=revision or None)
    return isinstance(cached, str)


def _is_small(source: SourceConfig) -> bool:
    if source.dataset in BUILTIN_DATASETS:
        return True
    if is_hub_dataset(source.dataset):
        return False
    path = Path(source.dataset).expanduser()
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) <= MAX_READ_BYTES
