"""What a subject is asked: held-out prompts, each with the row that it comes from, its gold answer and its reference
answer where there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_tune import settings
from lowrank_tune.data import Conversation, RowFault, Template, load, prompts, read
from lowrank_tune.data.load import Prompt
from lowrank_tune.data.tokenise import conversation, shape_of
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note
from lowrank_tune.types import Row


@dataclass(frozen=True)
class Question:
    """`number` names the random streams of its answers. `reference`: prompt and reference answer as the base reads
    them."""

    number: int
    ids: list[int]
    text: str
    gold: str | None
    row: Mapping[str, Any] = field(default_factory=dict)
    reference: Row | None = None


@dataclass(frozen=True)
class Asked:
    """The questions, and where they come from in words that a record can keep."""

    questions: list[Question]
    origin: str


def questions_on(source: settings.Source, count: int, seed: int, template: Template, system: str | None) -> Asked:
    """Up to `count` questions of a source, drawn as a run draws its held-out ones. Raises UserError where no row can be
    asked."""
    found = prompts(source, count, seed, system)
    usable = [(number, one) for number, one in enumerate(one for one in found if template.spoils(one.messages) is None)]
    if not usable:
        raise UserError(f"{source.dataset}: {template.spoils(found[0].messages)}")
    shape = shape_of(source, read(source, seed))
    made = [
        Question(
            number,
            template.prompt(one.messages),
            one.messages[-1].content,
            one.gold,
            one.row,
            _reference(one, source, shape, template, system),
        )
        for number, one in usable
    ]
    named = [
        source.dataset,
        *([source.name] if source.name else []),
        *([source.split] if source.split != "train" else []),
    ]
    return Asked(made, " ".join(named))


def _reference(one: Prompt, source: settings.Source, shape: str, template: Template, system: str | None) -> Row | None:
    """The row whole; of a pair there is none here: what is better than something else need not be what should be
    said."""
    talk = conversation(one.row, source, shape, system) if shape != "preference" else None
    if not isinstance(talk, Conversation):
        return None
    row = template.encode_many([talk.messages])[0]
    return None if isinstance(row, RowFault) or not any(row.says) else row


def own_questions(recipe: settings.Recipe, count: int, template: Template, emit: Emit) -> Asked:
    """The held-out questions of a run's own recipe; else its validation rows. Raises UserError where it has neither."""
    wanted = recipe.evaluate.heldout
    if wanted is not None:
        return questions_on(wanted, count, recipe.seed, template, recipe.data.system)
    if recipe.data.validation:
        parts = [
            questions_on(source, -(-count // len(recipe.data.validation)), recipe.seed, template, recipe.data.system)
            for source in recipe.data.validation
        ]
        several = [one for part in parts for one in part.questions][:count]
        return Asked(
            [
                Question(number, one.ids, one.text, one.gold, one.row, one.reference)
                for number, one in enumerate(several)
            ],
            ", ".join(part.origin for part in parts),
        )
    if recipe.algorithm in ("sft", "dpo") and recipe.data.validation_share:
        return _set_aside(recipe, count, template, emit)
    raise UserError(
        "this run's recipe has no held-out questions (`evaluate.heldout`): say what to evaluate on, as --on rows.jsonl"
    )


def _set_aside(recipe: settings.Recipe, count: int, template: Template, emit: Emit) -> Asked:
    """Rows that the run set aside of its training rows. Their gold answers are not kept, so they give losses, and
    prompts for a judge."""
    store = load(recipe.data, template, recipe.seed, _silent, pairs=recipe.pairs).validation
    if store is None or not store.units:
        raise UserError("this run has no validation rows: say what to evaluate on, as --on rows.jsonl")
    emit(
        Note(
            message="the run's validation rows are asked; they have no gold answers, so nothing tells which answers "
            "are right"
        )
    )
    questions = []
    for number in range(min(count, store.units)):
        row: Row = store[number * store.together]
        ids = [int(token) for token in row.ids[: list(row.says).index(True)]]
        reference = None if recipe.pairs else Row([int(token) for token in row.ids], [bool(said) for said in row.says])
        questions.append(Question(number, ids, template.decode(ids), None, {}, reference))
    return Asked(questions, "validation rows of the run")


def source_of(given: str, name: str | None, split: str | None, recipe: settings.Recipe | None) -> settings.Source:
    """The source that --on names; columns, format and gold answers are read as the recipe reads its own rows."""
    found = settings.Source(dataset=given, name=name, split=split or ("heldout" if given == "tutor" else "train"))
    like: Sequence[settings.Source] = (
        () if recipe is None else [*filter(None, [recipe.evaluate.heldout]), *recipe.data.train]
    )
    if not like or given.startswith("tutor") or like[0].dataset.startswith("tutor"):
        return found
    return found.model_copy(update={"columns": like[0].columns, "gold": like[0].gold})


def _silent(event: object) -> None:
    pass
