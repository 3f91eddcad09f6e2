"""The sources of rows, and how rows are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import NON_EMPTY, Day, Finding, Fraction, NonEmptyStr, PositiveInt, Settings

VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
VariableName = Annotated[str, Field(pattern=VARIABLE_NAME)]
JINJA_WORDS = ("true", "false", "none", "True", "False", "None", "not", "and", "or", "in", "is", "if", "else")
OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables of a chat template that the kit sets, beside the tokens of the tokenizer."""
DATA_FILE_PATTERN = re.compile(r".*\.(jsonl?|csv|parquet)(\.gz)?")
BUILT_IN = {"builtin:arithmetic": "the built-in problems", "builtin:arithmetic-preferences": "the built-in pairs"}
"""Data sets of the package, and what each contains."""
BUILT_IN_SPLITS = ("train", "heldout")
UNUSED_BY_BUILT_IN = ("config_name", "format", "columns", "ground_truth", "final_answer", "score_margin_scale")
"""Keys of a source that are fixed for the data sets of the package."""
UNUSED_BY_TEXT = ("ground_truth", "final_answer")
"""Keys of a source that concern answers."""
FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "humaneval",
    "mbpp",
    "preference",
    "text",
    "unpaired_preference",
]


def template_variable_fault(name: str, value: bool | int | float | str) -> str | None:
    """Returns why a variable of the chat template cannot be set; None if it can."""
    if re.fullmatch(VARIABLE_NAME, name) is None or name in JINJA_WORDS:
        return "is not the name of a variable"
    if name in OWN_VARIABLES or name.endswith("_token"):
        return "is set by the kit; leave it out"
    if name in ("date_string", "strftime_now"):
        return "is the date of the chat template: write `data.template_date`"
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    if isinstance(value, str) and any(0xD800 <= ord(character) < 0xE000 for character in value):
        return "contains a lone surrogate, which UTF-8 cannot encode"
    return None


class SourceConfig(Settings):
    """One source of rows."""

    dataset: NonEmptyStr
    """A hub id, `id@revision`, a file (JSON, JSON lines, CSV or TSV, each also gzipped; Parquet), a folder of such
    files, `builtin:arithmetic` (built-in problems) or `builtin:arithmetic-preferences` (pairs of answers to them)."""
    config_name: NonEmptyStr | None = None
    """Configuration of a hub data set, for example `main` of openai/gsm8k."""
    split: NonEmptyStr = "train"
    """Split of a hub data set, or of a built-in one (`train`, `heldout`)."""
    format: FormatName = "auto"
    """Shape of a row. `auto` detects it from the columns; the run prints what was found. `humaneval` and `mbpp` are
    tasks with unit tests, for `python_tests`; `preference` is a chosen and a rejected answer, or responses with scores;
    `unpaired_preference` is an answer with a label; `text` is plain text, for continued pretraining with
    `algorithm: sft`."""
    columns: dict[NonEmptyStr, NonEmptyStr] = Field(default_factory=dict)
    """Renames columns: from the name in the format to the name in the data, for example `{question: problem, answer:
    solution}`."""
    ground_truth: Literal["auto", "none", "answer", "hashes", "boxed", "last_number", "gold"] = "auto"
    """Source of the gold answer: `answer` (the whole answer), `hashes` (after `####`), `boxed` (the last box),
    `last_number`, `gold` (a column), or `none`. `auto` uses `####` at the end, else a column, else the last box, else
    an answer that is only a number."""
    max_samples: PositiveInt | None = None
    """Number of rows, drawn with the seed. A row that cannot be used is replaced by another one, as long as there are
    more."""
    final_answer: Literal["boxed"] | None = None
    """`boxed` puts the final answer of a reply in a box if `####` or `The answer is:` marks it at the end; other
    replies do not change."""
    score_margin_scale: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Margin of a pair per unit of difference between the scores of its sides, for `algorithm: reward` and rows without
    a column `margin`. 0: scores only decide which response is chosen."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the rows drawn from this source. Either all sources have a weight and the weights sum to 1, or none has
    one and row counts decide."""

    def findings(self) -> Iterator[Finding]:
        """Yields the keys, and a split, that this kind of source does not have."""
        if self.format == "text":
            for key in UNUSED_BY_TEXT:
                if self.is_set(key) and getattr(self, key) != "auto":
                    yield (key,), "does nothing for plain text (`format: text`), which has no answers"
        if self.dataset in BUILT_IN:
            for key in UNUSED_BY_BUILT_IN:
                if self.is_set(key) and getattr(self, key) != {}:
                    yield (
                        (key,),
                        f"does nothing for `{self.dataset}`, {BUILT_IN[self.dataset]}",
                    )
            if self.split not in BUILT_IN_SPLITS:
                yield (
                    ("split",),
                    f"`{self.dataset}` has the splits train and heldout",
                )
        elif DATA_FILE_PATTERN.fullmatch(self.dataset) and self.is_set("config_name"):
            yield (
                ("config_name",),
                "does nothing for a file; only hub data sets have configurations",
            )


Sources = Annotated[tuple[SourceConfig, ...], Field(strict=False)]


class DataConfig(Settings):
    """The rows, and how they are read."""

    train: Annotated[tuple[SourceConfig, ...], *NON_EMPTY]
    """Sources of the training rows."""
    validation: Sources = ()
    """Sources of the validation rows. Without them, `eval_fraction` of the training rows is held out."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=0.9)] = 0.05
    """Share of the training rows held out for validation; 0 for none."""
    eval_rows: PositiveInt | None = None
    """Number of training rows held out for validation, in place of `eval_fraction`."""
    expected_tokens: PositiveInt | None = None
    """Tokens of all training rows as counted by the author of the recipe; printed beside the measured number."""
    system_prompt: str | None = None
    """System prompt for rows that have none."""
    template_date: Day | None = None
    """Date (YYYY-MM-DD) that the chat template of the base writes, if it writes one. Default: the day on which the run
    began if the template uses the clock (`strftime_now`), else the template's own date."""
    chat_template_kwargs: dict[VariableName, bool | int | float | str] = Field(default_factory=dict)
    """Variables of the base's chat template, for example `{enable_thinking: false}` for Qwen3: in training, rollouts,
    evaluation, `chat` and the exported chat template. All stages of a chain have the same."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Maximum length of a row in tokens."""
    max_prompt_length: Annotated[int, Field(ge=1)] = 512
    """Maximum length of a prompt in tokens, where completions are drawn. A longer prompt is dropped and counted."""
    truncation: Literal["drop", "truncate"] = "drop"
    """`drop`: a row that is too long is dropped and counted. `truncate`: it is cut at the last whole turn that fits, or
    dropped if none fits. A pair is cut at the front: the oldest exchanges of its prompt are removed, the same on both
    sides. No answer is ever cut."""
    max_invalid_fraction: Fraction = 0.1
    """Refuses to train if more than this share of the rows of a source cannot be used."""

    def findings(self) -> Iterator[Finding]:
        """Yields `eval_fraction` beside other validation rows, variables of the chat template that have another
        setting, and weights of sources that are missing, do not sum to 1, or have no effect."""
        if self.is_set("eval_fraction") and self.validation:
            yield (
                ("eval_fraction",),
                "contradicts `data.validation`: give one of the two",
            )
        elif self.is_set("eval_fraction") and self.is_set("eval_rows"):
            yield (
                ("eval_fraction",),
                "contradicts `data.eval_rows`: give one of the two",
            )
        yield from self._variable_findings()
        yield from self.weight_findings()

    def _variable_findings(self) -> Iterator[Finding]:
        for name, value in self.chat_template_kwargs.items():
            fault = template_variable_fault(name, value)
            if fault is not None:
                yield (
                    ("chat_template_kwargs", name),
                    fault,
                )

    def weight_findings(self) -> Iterator[Finding]:
        """Yields weights of training sources that are missing, do not sum to 1, or have no effect."""
        is_weighted = [source.is_set("weight") for source in self.train]
        if not any(is_weighted):
            return
        if len(is_weighted) == 1:
            yield (
                ("train", 0, "weight"),
                "does nothing with a single source",
            )
            return
        for index, has_weight in enumerate(is_weighted):
            if not has_weight:
                yield (
                    ("train", index, "weight"),
                    "is missing: give every source a weight, or none",
                )
        if all(is_weighted):
            total = sum(source.weight or 0.0 for source in self.train)
            if abs(total - 1.0) > 1e-6:
                yield (
                    ("train", 0, "weight"),
                    f"the weights of the sources sum to {total:.6g}, and must sum to 1",
                )
