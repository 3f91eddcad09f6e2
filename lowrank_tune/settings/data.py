"""Where rows come from and which are used."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.settings.common import NON_EMPTY, Day, Fraction, NonEmptyStr, PositiveInt, Settings


class SourceConfig(Settings):
    """One source of rows."""

    dataset: NonEmptyStr
    """A hub id, `id@revision`, a file (JSON, JSON lines, CSV, Parquet; gz too), a folder, `builtin:arithmetic` (the
    built-in problems) or `builtin:arithmetic-preferences` (pairs of answers to them)."""
    config_name: NonEmptyStr | None = None
    """Configuration of a hub data set (`main` of openai/gsm8k)."""
    split: NonEmptyStr = "train"
    """Split of a hub data set or of the built-in ones (train, heldout)."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "preference"] = (
        "auto"
    )
    """Shape of a row. `auto` looks at the columns and says what it found. `preference` is a chosen and a rejected
    answer."""
    columns: dict[NonEmptyStr, NonEmptyStr] = Field(default_factory=dict)
    """Renames columns: the format's name to the data's name, as `{question: problem, answer: solution}`."""
    ground_truth: Literal["auto", "none", "answer", "hashes", "boxed", "last_number", "gold"] = "auto"
    """Where the gold answer stands: after `####`, in the last box, the last number, the whole answer, or a column
    `gold`."""
    max_samples: PositiveInt | None = None
    """Takes this many rows, drawn with the seed. One that cannot be used gives way to another of the draw, as long as
    there are more."""
    final_answer: Literal["boxed"] | None = None
    """Puts the final answer of a reply in a box, where `####` or `The answer is:` at its end says which it is; other
    replies stay."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the rows drawn from this source. All sources have one, and they sum to 1; or none has, and row counts
    decide."""


Sources = Annotated[tuple[SourceConfig, ...], Field(strict=False)]


class DataConfig(Settings):
    """What is trained on."""

    train: Annotated[tuple[SourceConfig, ...], *NON_EMPTY]
    """Sources of the training rows."""
    validation: Sources = ()
    """Sources of the validation rows. Without them `eval_fraction` of the training rows is set aside."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=0.9)] = 0.05
    """Share of the training rows set aside for validation; 0 for none."""
    eval_rows: PositiveInt | None = None
    """Or: so many of the training rows."""
    expected_tokens: PositiveInt | None = None
    """Tokens of all training rows as the recipe's author counted them; shown beside what is measured."""
    system_prompt: str | None = None
    """A system prompt for rows that bring none."""
    template_date: Day | None = None
    """The date (YYYY-MM-DD) that the base's chat template writes, where it writes one. By default the day on which the
    run began, where the template uses the clock (`strftime_now`); else the template's own."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens."""
    max_prompt_length: Annotated[int, Field(ge=1)] = 512
    """Longest prompt in tokens, where completions are drawn; a longer one is dropped and counted."""
    truncation: Literal["drop", "truncate"] = "drop"
    """A longer row is dropped and counted; or cut at the last whole turn that fits, and dropped where none does. A pair
    is cut at the front: the oldest exchanges of its prompt go, the same on both sides; no answer is ever cut."""
    max_invalid_fraction: Fraction = 0.1
    """Stops before training when more than this share of the rows is unusable."""
