"""Held-out questions: prompts with the row that they come from, its gold answer and its reference answer, if
present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lowrank_tune.batch import Row
from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.data import (
    ChatTemplate,
    InvalidRow,
    Prompt,
    TokenizedDataset,
    accepted_prompts,
    load,
    load_heldout_prompts,
    read_source,
)
from lowrank_tune.data.encode import conversation_of
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.text_rows import encode_documents
from lowrank_tune.data.tokenize import format_of
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage, ignore_event

ARITHMETIC = "builtin:arithmetic"
DOCUMENT_PROMPT = 32
"""Tokens of a document that a sample continues."""
DEFAULT_MAX_LENGTH = 1024
"""Tokens of a document that are read without a recipe, as `data.max_length` by default."""


@dataclass(frozen=True)
class EvalQuestion:
    """A held-out prompt as token ids and as text.

    `number` selects the random streams of its answers. `reference`: prompt and reference answer as token ids.
    """

    prompt_ids: list[int]
    text: str
    ground_truth: str | None
    number: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    reference: Row | None = None

    @property
    def is_document(self) -> bool:
        """Whether the reference is plain text, all of which is trained."""
        return self.reference is not None and bool(self.reference.completion_mask[0])

    def row_length(self, max_new_tokens: int) -> int:
        """Returns the tokens of the prompt with the longer of its answer and its reference answer."""
        length = len(self.prompt_ids) + max_new_tokens
        if self.reference is not None:
            length = max(length, len(self.reference.input_ids))
        return length


@dataclass(frozen=True)
class EvalQuestions:
    """Questions, and a description of their source for the record."""

    questions: list[EvalQuestion]
    origin: str


def render_questions(prompts: Sequence[Prompt], template: ChatTemplate) -> list[EvalQuestion]:
    """Returns held-out prompts, which the chat template accepts, as it renders them."""
    questions = []
    encoded = template.prompt_many([prompt.messages for prompt in prompts], [prompt.tools for prompt in prompts])
    for number, (prompt, prompt_ids) in enumerate(zip(prompts, encoded, strict=True)):
        assert not isinstance(prompt_ids, InvalidRow), prompt_ids.reason
        text = prompt.messages[-1].content
        questions.append(
            EvalQuestion(
                prompt_ids,
                text,
                prompt.ground_truth,
                number,
                prompt.row,
            )
        )
    return questions


def select_questions(
    rows: TokenizedDataset,
    template: ChatTemplate,
    count: int,
    with_reference: bool = False,
) -> list[EvalQuestion]:
    """Returns the prompts of the first row of the first `count` units of a validation part (of pairs, the chosen row).
    They have no gold answers. With their references, of a document every row is one."""
    row_numbers = rows.unit_starts[:-1]
    if with_reference:
        row_numbers = np.union1d(row_numbers, np.flatnonzero(rows.is_document))
    questions = []
    for number, row_number in enumerate(row_numbers[:count]):
        row: Row = rows[int(row_number)]
        prompt_ids, _ = split_row(row)
        question = EvalQuestion(
            prompt_ids,
            template.decode(prompt_ids),
            None,
            number,
        )
        if with_reference:
            question = replace(question, reference=_copy_row(row))
        questions.append(question)
    return questions


def split_row(row: Row) -> tuple[list[int], list[int]]:
    """Returns the token ids before the first trained token, and the others. Of plain text, which is trained from its
    first token, the first `DOCUMENT_PROMPT` tokens, or half of fewer, are the prompt."""
    token_ids = list(map(int, row.input_ids))
    start = list(row.completion_mask).index(True)
    if start == 0:
        start = max(1, min(DOCUMENT_PROMPT, len(token_ids) // 2))
    return token_ids[:start], token_ids[start:]


def _copy_row(row: Row) -> Row:
    """Returns a row of a store as Python lists."""
    return Row(list(map(int, row.input_ids)), list(map(bool, row.completion_mask)))


def load_eval_questions(
    source: SourceConfig,
    count: int,
    seed: int,
    template: ChatTemplate,
    system: str | None,
    max_length: int = DEFAULT_MAX_LENGTH,
) -> EvalQuestions:
    """Returns up to `count` questions of a source, drawn as the held-out questions of a run are; of plain text its
    documents, each cut into rows of `max_length` tokens.

    Raises UserError if none of its rows can be used.
    """
    if format_of(source, read_source(source, seed), accepts_text=True) == "text":
        questions = _document_questions(
            source,
            count,
            seed,
            template,
            max_length,
        )
        return EvalQuestions(questions, _origin(source))
    candidates = load_heldout_prompts(
        source,
        count,
        seed,
        system,
    )
    usable = accepted_prompts(candidates, template)
    if not usable:
        reason = template.validate_messages(candidates[0].messages, candidates[0].tools)
        raise UserError(f"{source.dataset}: {reason}")
    format_name = format_of(source, read_source(source, seed))
    questions = []
    for question, prompt in zip(render_questions(usable, template), usable, strict=True):
        reference = _reference(
            prompt,
            source,
            format_name,
            template,
            system,
        )
        questions.append(replace(question, reference=reference))
    return EvalQuestions(questions, _origin(source))


def _origin(source: SourceConfig) -> str:
    origin = source.dataset
    if source.config_name:
        origin = f"{origin} {source.config_name}"
    if source.split != "train":
        origin = f"{origin} {source.split}"
    return origin


def _document_questions(
    source: SourceConfig,
    count: int,
    seed: int,
    template: ChatTemplate,
    max_length: int,
) -> list[EvalQuestion]:
    """Returns up to `count` rows of documents of a source, whose losses are measured. Raises UserError without any."""
    drawn = source.model_copy(update={"max_samples": min(count, source.max_samples or count)})
    rows = read_source(drawn, seed)
    report = SourceReport(rows.name, "text")
    questions: list[EvalQuestion] = []
    raws = [raw for _, raw in rows]
    for entry in encode_documents(raws, source.columns, max_length, template, report):
        if isinstance(entry, InvalidRow):
            continue
        for row in entry.rows:
            questions.append(_document_question(row, len(questions), template))
    if not questions:
        raise UserError(f"{rows.name}: none of its rows contains a text")
    return questions[:count]


def _document_question(
    row: Row,
    number: int,
    template: ChatTemplate,
) -> EvalQuestion:
    prompt_ids, _ = split_row(row)
    return EvalQuestion(
        prompt_ids,
        template.decode(prompt_ids),
        None,
        number,
        reference=row,
    )


def _reference(
    prompt: Prompt,
    source: SourceConfig,
    format_name: str,
    template: ChatTemplate,
    system: str | None,
) -> Row | None:
    """Returns the row with its answer, None without one; of preference pairs also None, since an answer that is better
    than another one need not be a good one."""
    if format_name == "preference":
        return None
    try:
        parsed = conversation_of(
            prompt.row,
            source,
            format_name,
            system,
        )
    except InvalidRow:
        return None
    (row,) = template.encode_many([parsed.messages], [parsed.tools])
    if isinstance(row, InvalidRow) or not any(row.completion_mask):
        return None
    return row


def recipe_heldout_questions(
    recipe: RecipeConfig,
    count: int,
    template: ChatTemplate,
    emit: Emit,
) -> EvalQuestions:
    """Returns the held-out questions of a run's recipe, else its validation rows. Raises UserError if it has
    neither."""
    system = recipe.data.system_prompt
    eval_dataset = recipe.evaluate.eval_dataset
    if eval_dataset is not None:
        return load_eval_questions(
            eval_dataset,
            count,
            recipe.seed,
            template,
            system,
            recipe.data.max_length,
        )
    validation = recipe.data.validation
    if validation:
        count_per_source = -(-count // len(validation))
        parts = [
            load_eval_questions(
                source,
                count_per_source,
                recipe.seed,
                template,
                system,
                recipe.data.max_length,
            )
            for source in validation
        ]
        joined = _join_parts(parts, count)
        if recipe.uses_labels:
            # An answer with a label need not be a good one.
            return replace(joined, questions=[replace(question, reference=None) for question in joined.questions])
        return joined
    if recipe.algorithm in ("sft", "dpo", "kto") and recipe.data.eval_fraction:
        return _validation_questions(
            recipe,
            count,
            template,
            emit,
        )
    raise UserError(
        "this run's recipe has no held-out questions (`evaluate.eval_dataset`): give a data set, for example "
        "--dataset rows.jsonl"
    )


def _join_parts(parts: Sequence[EvalQuestions], count: int) -> EvalQuestions:
    """Returns the first `count` questions of all parts, with new numbers."""
    questions: list[EvalQuestion] = []
    for part in parts:
        questions += part.questions
    numbered = [replace(question, number=number) for number, question in enumerate(questions[:count])]
    return EvalQuestions(numbered, ", ".join(part.origin for part in parts))


def _validation_questions(
    recipe: RecipeConfig,
    count: int,
    template: ChatTemplate,
    emit: Emit,
) -> EvalQuestions:
    """Returns the validation rows that the run split from its training rows. Their gold answers are not stored, so they
    give losses, and prompts for a reward model."""
    rows = load(
        recipe.data,
        template,
        recipe.seed,
        ignore_event,
        pairs=recipe.uses_pairs,
        labels=recipe.uses_labels,
    ).validation
    if rows is None or not rows.units:
        raise UserError("this run has no validation rows: give a data set, for example --dataset rows.jsonl")
    message = "the questions are the run's validation rows; they have no gold answers, so answers cannot be graded"
    emit(LogMessage(message=message))
    questions = select_questions(
        rows,
        template,
        count,
        with_reference=not (recipe.uses_pairs or recipe.uses_labels),
    )
    return EvalQuestions(questions, "validation rows of the run")


def eval_source(
    dataset: str,
    config_name: str | None,
    split: str | None,
    recipe: RecipeConfig | None,
) -> SourceConfig:
    """Returns the source of --dataset; columns, format and gold answers are read as the recipe reads its own rows."""
    if not split:
        split = "heldout" if dataset == ARITHMETIC else "train"
    source = SourceConfig(
        dataset=dataset,
        config_name=config_name,
        split=split,
    )
    if recipe is None:
        return source
    own_source = recipe.evaluate.eval_dataset or recipe.data.train[0]
    if dataset.startswith(ARITHMETIC) or own_source.dataset.startswith(ARITHMETIC):
        return source
    return source.model_copy(update={"columns": own_source.columns, "ground_truth": own_source.ground_truth})
