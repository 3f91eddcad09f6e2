"""`lowrank-tune verify`: the rewards of a recipe over a file of responses, or over the reference answers of its own
data.

A row of the file is a row of the data with the model's own words beside it, in the first of `completions` (a list),
`responses`, `completion` or `response`: a text, or an object with `text` and perhaps `finish` or `stopped`. All other
columns are the data's, read as the recipe's first source says; a row without a question is judged without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_tune import settings
from lowrank_tune.build import load_roles
from lowrank_tune.build.learned import ROLE, answer_ids, closing, score_rows
from lowrank_tune.build.online import judged_rows
from lowrank_tune.data import Conversation, RowFault, Template, detect, load_asked, read
from lowrank_tune.data.files import Raw
from lowrank_tune.data.gold import find_gold
from lowrank_tune.data.pairs import PROMPTS
from lowrank_tune.data.report import Dropped
from lowrank_tune.data.tokenise import conversation
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Progress
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.model.base import load_base, load_tokenizer
from lowrank_tune.rewards import Item, Score, Scorer, Weighted, make, unusable
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.verdicts import scored, would_stop
from lowrank_tune.types import Message

SAID = ("completions", "responses", "completion", "response")
MICRO_TOKENS = 1 << 14


@dataclass(frozen=True)
class Response:
    """What is judged: where its row stands, which of the row's completions it is (from 1), and all that the rewards
    see."""

    place: str
    number: int
    item: Item


@dataclass
class Verified:
    """What the rewards said. `rows` may be fewer than the responses, where a person `interrupted`; `dropped` are rows
    that are none."""

    weighted: list[Weighted]
    responses: list[Response]
    most: float
    dropped: dict[str, Dropped] = field(default_factory=dict)
    rows: list[list[Score]] = field(default_factory=list)
    interrupted: bool = False

    def stops(self) -> str | None:
        """Why a run would not bear these failures."""
        return would_stop(self.weighted, self.rows, self.most)

    def lines(self) -> Iterator[dict[str, Any]]:
        """One object a response, for a file."""
        for response, scores in zip(self.responses, self.rows, strict=False):
            told = {
                each.name: {
                    "value": score.value,
                    "verdict": score.verdict,
                    "reason": score.reason,
                    "seconds": round(score.seconds, 6),
                }
                for each, score in zip(self.weighted, scores, strict=True)
            }
            values = [
                each.weight * score.value
                for each, score in zip(self.weighted, scores, strict=True)
                if score.value is not None
            ]
            reward = sum(values) if len(values) == len(scores) else None
            yield {"place": response.place, "number": response.number, "reward": reward, "rewards": told}


def verify(
    recipe: settings.Recipe, file: str | None, limit: int | None, emit: Emit, device: torch.device | None = None
) -> Verified:
    """Judges every response. Raises UserError where there is none, or the rewards cannot be made; Ctrl-C keeps what is
    done."""
    if not recipe.rewards:
        raise UserError(
            f"{recipe.name or 'this recipe'} has no rewards: `algorithm: {recipe.algorithm}` learns from its rows alone"
        )
    weighted = make(recipe.rewards, Path.cwd())
    learned = [each.reward for each in weighted if isinstance(each.reward, RewardModel)]
    if learned and ROLE not in recipe.adapters:
        raise UserError(
            "`reward_model` needs the adapter of an earlier stage of this chain, and only a run has it: name it with "
            f"stages.{recipe.name}.adapters.{ROLE}.path=RUN/N-NAME"
        )
    reader = Reader(recipe, Template.of(load_tokenizer(recipe.base)), bool(learned))
    found = Verified(weighted, [], recipe.rollout.max_unscored_share)
    found.responses = reader.references(emit) if file is None else reader.responses(file, weighted, found.dropped)
    found.responses = found.responses[:limit]
    if learned:
        _give_base(recipe, learned, reader.template, device, emit)
    with Scorer[int]([each.reward for each in weighted]) as scorer:
        _judge(found, scorer, emit)
    return found


def _judge(found: Verified, scorer: Scorer[int], emit: Emit) -> None:
    total = len(found.responses)
    try:
        emit(Progress(what="verifying", done=0, total=total))
        for scores in scored(
            scorer,
            [one.item for one in found.responses],
            lambda done: emit(Progress(what="verifying", done=done, total=total)),
        ):
            found.rows.append(scores)
    except KeyboardInterrupt:
        found.interrupted = True


def _give_base(
    recipe: settings.Recipe, learned: list[RewardModel], template: Template, device: torch.device | None, emit: Emit
) -> None:
    """Loads the base, so that the learned rewards can read."""
    saved = {
        name: read_adapter(wanted.path, f"adapters.{name}.path", head=name == ROLE)
        for name, wanted in recipe.adapters.items()
        if wanted.path
    }
    emit(Progress(what=f"loading {recipe.base.model}", done=0, total=1))
    base = load_base(recipe.base, template.tokenizer, device)
    plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": False})})
    roles = load_roles(plain, base, saved, emit)
    emit(Progress(what=f"loading {recipe.base.model}", done=1, total=1))
    for reward in learned:
        reward.read = lambda rows: score_rows(roles, rows, template.pad_id, MICRO_TOKENS)


@dataclass
class Reader:
    """Responses from rows. `ids`: also as the base reads them."""

    recipe: settings.Recipe
    template: Template
    ids: bool

    def references(self, emit: Emit) -> list[Response]:
        """The reference answers of the recipe's own data."""
        asked = load_asked(
            self.recipe.data,
            self.template,
            self.recipe.seed,
            emit,
            needs_gold=self.recipe.needs_gold,
            unusable=judged_rows(self.recipe),
        )
        found = [
            Response(str(place), 1, self._item(one.text, one.answer, one.gold, one.row, True, one.ids))
            for place, one in zip(asked.places, asked.asked, strict=True)
            if one.answer
        ]
        if not found:
            raise UserError("the rows of `data.train` hold no reference answers; give responses with --file")
        return found

    def responses(self, file: str, weighted: list[Weighted], dropped: dict[str, Dropped]) -> list[Response]:
        """Those of a file; rows that hold none, or that no reward could judge by, go to `dropped`."""
        first = self.recipe.data.train[0]
        source, found = settings.Source(dataset=file), list[Response]()
        if not first.dataset.startswith("tutor"):
            source = source.model_copy(update={"format": first.format, "columns": first.columns, "gold": first.gold})
        for place, raw in read(source, self.recipe.seed):
            try:
                if isinstance(raw, RowFault):
                    raise raw
                several = list(self._of(raw, source, str(place)))
                if why := unusable(weighted, several[0].item):
                    raise RowFault(why)
                found += several
            except RowFault as fault:
                dropped.setdefault(fault.reason, Dropped()).add(str(place))
        if not found:
            reason, gone = max(dropped.items(), key=lambda each: each[1].count)
            raise UserError(f"{file}: none of its rows can be judged: {reason} ({gone.places[0]})")
        return found

    def _of(self, raw: Raw, source: settings.Source, place: str) -> Iterator[Response]:
        """The responses of one row. Raises RowFault."""
        if not isinstance(raw, Mapping):
            raise RowFault("not an object with columns")
        name = next((each for each in SAID if raw.get(each) is not None), None)
        if name is None:
            raise RowFault(f"no response: expected one of the columns {', '.join(SAID)}")
        row = {key: value for key, value in raw.items() if key != name}
        talk = self._talk(row, source)
        ids = self._prompt(talk.messages) if self.ids and talk.messages else []
        said = raw[name] if isinstance(raw[name], list) else [raw[name]]
        if not said:
            raise RowFault(f"`{name}` is empty")
        for number, one in enumerate(said, 1):
            text, stopped = _told(one, raw)
            yield Response(
                place,
                number,
                self._item(talk.messages[-1].content if talk.messages else "", text, talk.gold, row, stopped, ids),
            )

    def _talk(self, row: Raw, source: settings.Source) -> Conversation:
        """What was asked, and the gold answer; of a row of no known shape what can be found."""
        shapes: list[str] = [source.format] if source.format != "auto" else []
        try:
            shapes.append(detect(row, source.columns, False))
        except UserError:
            pass  # no shape that data could have: it need not, for nothing is learned from it
        for shape in shapes:
            talk = (
                conversation(row, source, shape, self.recipe.data.system, answered=False)
                if shape != "preference"
                else None
            )
            if isinstance(talk, Conversation):
                messages = talk.messages[:-1] if talk.messages[-1].role == "assistant" else talk.messages
                return Conversation(messages, talk.gold)
        text = next(
            (value for name in PROMPTS if isinstance(value := row.get(source.columns.get(name, name)), str)), None
        )
        rule = [Message("system", self.recipe.data.system)] if self.recipe.data.system else []
        return Conversation(
            (*rule, Message("user", text)) if text else (), find_gold(row, source.columns, "gold", "", whole=False)
        )

    def _prompt(self, messages: tuple[Message, ...]) -> list[int]:
        try:
            return self.template.prompt(messages)
        except UserError as error:
            raise RowFault(str(error)) from error

    def _item(
        self, prompt: str, text: str | None, gold: str | None, row: Mapping[str, Any], stopped: bool, ids: Any
    ) -> Item:
        """As a run would have it, had the policy written this."""
        text = text or ""
        tokens = len(self.template.tokenizer(text, add_special_tokens=False)["input_ids"]) + stopped
        said = answer_ids(self.template, text) if self.ids and len(ids) else []
        if said and not stopped:
            said = said[: len(said) - len(closing(self.template))]
        return Item(prompt, text, gold, row, stopped, tokens, [*ids, *said] if said else ())


def _told(one: Any, row: Mapping[str, Any]) -> tuple[str, bool]:
    """A response's words, and whether it ended by itself. Raises RowFault."""
    about = one if isinstance(one, Mapping) else row
    text = one.get("text", one.get("content")) if isinstance(one, Mapping) else one
    if not isinstance(text, str):
        raise RowFault("a response is no text")
    stopped = about.get("stopped")
    return text, stopped if isinstance(stopped, bool) else about.get("finish", "stop") == "stop"
