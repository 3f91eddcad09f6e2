"""What a subject is asked: held-out prompts, each with the row that it comes from, its gold answer and its reference
answer where there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_tune.batch import Row
from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.data import ChatTemplate, Conversation, InvalidRow, load, load_heldout_prompts, read_source
from lowrank_tune.data.encode import conversation_of
from lowrank_tune.data.load import Prompt
from lowrank_tune.data.tokenize import format_of
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, LogMessage


@dataclass(frozen=True)
class EvalQuestion:
    """`number` names the random streams of its answers. `reference`: prompt and reference answer as the base reads
    them."""

    number: int
    prompt_ids: list[int]
    text: str
    ground_truth: str | None
    row: Mapping[str, Any] = field(default_factory=dict)
    reference: Row | None = None


@dataclass(frozen=True)
class EvalQuestions:
    """The questions, and where they come from in words that a record can keep."""

    questions: list[EvalQuestion]
    origin: str


def load_eval_questions(
    source: SourceConfig,
    count: int,
    seed: int,
    template: ChatTemplate,
    system: str | None,
) -> EvalQuestions:
    """Up to `count` questions of a source, drawn as a run draws its held-out ones. Raises UserError where no row can be
    asked."""
    candidates = load_heldout_prompts(source, count, seed, system)
    usable = [
        (number, prompt)
        for number, prompt in enumerate(
            prompt for prompt in candidates if template.validate_messages(prompt.messages) is None
        )
    ]
    if not usable:
        raise UserError(f"{source.dataset}: {template.validate_messages(candidates[0].messages)}")
    shape = format_of(source, read_source(source, seed))
    questions = [
        EvalQuestion(
            number,
            template.prompt(prompt.messages),
            prompt.messages[-1].content,
            prompt.ground_truth,
            prompt.row,
            _reference(prompt, source, shape, template, system),
        )
        for number, prompt in usable
    ]
    named = [
        source.dataset,
        *([source.config_name] if source.config_name else []),
        *([source.split] if source.split != "train" else []),
    ]
    return EvalQuestions(questions, " ".join(named))


def _reference(
    prompt: Prompt,
    source: SourceConfig,
    format_name: str,
    template: ChatTemplate,
    system: str | None,
) -> Row | None:
    """The row whole; of a pair there is none here: what is better than something else need not be what should be
    said."""
    if format_name != "preference":
        parsed = conversation_of(prompt.row, source, format_name, system)
    else:
        parsed = None
    if not isinstance(parsed, Conversation):
        return None
    row = template.encode_many([parsed.messages])[0]
    if isinstance(row, InvalidRow) or not any(row.completion_mask):
        return None
    return row


def recipe_heldout_questions(recipe: RecipeConfig, count: int, template: ChatTemplate, emit: Emit) -> EvalQuestions:
    """The held-out questions of a run's own recipe; else its validation rows. Raises UserError where it has neither."""
    eval_dataset = recipe.evaluate.eval_dataset
    if eval_dataset is not None:
        return load_eval_questions(eval_dataset, count, recipe.seed, template, recipe.data.system_prompt)
    if recipe.data.validation:
        parts = [
            load_eval_questions(
                source,
                -(-count // len(recipe.data.validation)),
                recipe.seed,
                template,
                recipe.data.system_prompt,
            )
            for source in recipe.data.validation
        ]
        questions = [question for part in parts for question in part.questions][:count]
        return EvalQuestions(
            [
                EvalQuestion(
                    number,
                    question.prompt_ids,
                    question.text,
                    question.ground_truth,
                    question.row,
                    question.reference,
                )
                for number, question in enumerate(questions)
            ],
            ", ".join(part.origin for part in parts),
        )
    if recipe.algorithm in ("sft", "dpo") and recipe.data.eval_fraction:
        return _validation_questions(recipe, count, template, emit)
    raise UserError(
        "this run's recipe has no held-out questions (`evaluate.eval_dataset`): give a data set, for example "
        "--dataset rows.jsonl"
    )


def _validation_questions(recipe: RecipeConfig, count: int, template: ChatTemplate, emit: Emit) -> EvalQuestions:
    """Rows that the run set aside of its training rows. Their gold answers are not kept, so they give losses, and
    prompts for a reward model."""
    store = load(recipe.data, template, recipe.seed, _ignore_event, pairs=recipe.uses_pairs).validation
    if store is None or not store.units:
        raise UserError("this run has no validation rows: give a data set, for example --dataset rows.jsonl")
    emit(
        LogMessage(
            message="the run's validation rows are asked; they have no gold answers, so nothing tells which answers "
            "are right"
        )
    )
    questions = []
    for number in range(min(count, store.units)):
        row: Row = store[number * store.rows_per_unit]
        prompt_ids = [int(token) for token in row.input_ids[: list(row.completion_mask).index(True)]]
        if recipe.uses_pairs:
            reference = None
        else:
            reference = Row(
                [int(token) for token in row.input_ids], [bool(in_completion) for in_completion in row.completion_mask]
            )
        questions.append(EvalQuestion(number, prompt_ids, template.decode(prompt_ids), None, {}, reference))
    return EvalQuestions(questions, "validation rows of the run")


def eval_source(given: str, name: str | None, split: str | None, recipe: RecipeConfig | None) -> SourceConfig:
    """The source of --dataset; columns, format and gold answers are read as the recipe reads its own rows."""
    source = SourceConfig(
        dataset=given,
        config_name=name,
        split=split or ("heldout" if given == "builtin:arithmetic" else "train"),
    )
    like: Sequence[SourceConfig] = (
        () if recipe is None else [*filter(None, [recipe.evaluate.eval_dataset]), *recipe.data.train]
    )
    if not like or given.startswith("builtin:arithmetic") or like[0].dataset.startswith("builtin:arithmetic"):
        return source
    return source.model_copy(update={"columns": like[0].columns, "ground_truth": like[0].ground_truth})


def _ignore_event(event: object) -> None:
    pass
