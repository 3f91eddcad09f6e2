"""Responses for the rewards of a recipe: from a file of completions, or the reference answers of the recipe's own data.

A row of the file is a row of the data with the model's text in the first of `completions` (a list), `responses`,
`completion` or `response`: a text, or an object with `text` and optional `finish_reason` or `stopped`. All other
columns are those of the data, read with the settings of the recipe's first source. A row without a question is scored
without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lowrank_tune.assembly.reward_model import encode_answer, end_of_turn_ids
from lowrank_tune.assembly.rl import make_row_check
from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.data import (
    ChatTemplate,
    Conversation,
    InvalidRow,
    detect_format,
    load_prompts,
    read_source,
)
from lowrank_tune.data.encode import conversation_of
from lowrank_tune.data.formats import RawRow
from lowrank_tune.data.ground_truth import extract_answer
from lowrank_tune.data.message import Message
from lowrank_tune.data.preference_pairs import PROMPT_COLUMNS
from lowrank_tune.data.report import DroppedRows
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.questions import ARITHMETIC
from lowrank_tune.events import Emit
from lowrank_tune.rewards import RewardInput, WeightedReward, row_rejection_reason

COMPLETION_KEYS = ("completions", "responses", "completion", "response")


@dataclass(frozen=True)
class ResponseItem:
    """One response: the location of its row, its number among the row's completions (from 1), and the input of the
    rewards."""

    location: str
    index: int
    reward_input: RewardInput


@dataclass(frozen=True)
class RowPrompt:
    """The prompt of a row as text and, if rewards need them, as token ids; its gold answer; and the row."""

    text: str
    ground_truth: str | None
    row: Mapping[str, Any]
    prompt_ids: Sequence[int]


@dataclass
class ResponseReader:
    """Reads responses from rows. `with_token_ids`: also as token ids, for a learned reward."""

    recipe: RecipeConfig
    template: ChatTemplate
    with_token_ids: bool

    def references(self, emit: Emit) -> list[ResponseItem]:
        """Returns the reference answers of the recipe's own data. Raises UserError if there are none."""
        prompts = load_prompts(
            self.recipe.data,
            self.template,
            self.recipe.seed,
            emit,
            needs_ground_truth=self.recipe.needs_ground_truth,
            unusable=make_row_check(self.recipe),
        )
        responses = []
        for location, example in zip(prompts.locations, prompts.examples, strict=True):
            if example.answer:
                prompt = RowPrompt(
                    example.text,
                    example.ground_truth,
                    example.row,
                    example.input_ids,
                )
                reward_input = self._reward_input(prompt, example.answer, True)
                responses.append(ResponseItem(str(location), 1, reward_input))
        if not responses:
            raise UserError("the rows of `data.train` contain no reference answers; give responses with --file")
        return responses

    def responses(
        self,
        file: str,
        weighted: list[WeightedReward],
        dropped: dict[str, DroppedRows],
    ) -> list[ResponseItem]:
        """Returns the responses of a file. Rows without one, or that no reward can score, are added to `dropped`.
        Raises UserError if no row is left."""
        source = self._source(file)
        responses: list[ResponseItem] = []
        for location, raw in read_source(source, self.recipe.seed):
            try:
                if isinstance(raw, InvalidRow):
                    raise raw
                row_responses = list(self._responses_of_row(raw, source, str(location)))
                reason = row_rejection_reason(weighted, row_responses[0].reward_input)
                if reason is not None:
                    raise InvalidRow(reason)
                responses += row_responses
            except InvalidRow as error:
                dropped.setdefault(error.reason, DroppedRows()).add(str(location))
        if not responses:
            reason, rows = max(dropped.items(), key=lambda entry: entry[1].count)
            raise UserError(f"{file}: none of its rows can be scored: {reason} ({rows.locations[0]})")
        return responses

    def _source(self, file: str) -> SourceConfig:
        """Returns the file as a source with the settings of the recipe's first source."""
        source = SourceConfig(dataset=file)
        first = self.recipe.data.train[0]
        if first.dataset.startswith(ARITHMETIC):
            return source
        settings = {
            "format": first.format,
            "columns": first.columns,
            "ground_truth": first.ground_truth,
        }
        return source.model_copy(update=settings)

    def _responses_of_row(
        self,
        raw: RawRow,
        source: SourceConfig,
        location: str,
    ) -> Iterator[ResponseItem]:
        """Yields the responses of one row. Raises InvalidRow."""
        if not isinstance(raw, Mapping):
            raise InvalidRow("not an object with columns")
        column = _completion_column(raw)
        row = {key: value for key, value in raw.items() if key != column}
        prompt = self._row_prompt(row, source)
        completions = raw[column] if isinstance(raw[column], list) else [raw[column]]
        if not completions:
            raise InvalidRow(f"`{column}` is empty")
        for index, completion in enumerate(completions, 1):
            text, stopped = _parse_response(completion, raw)
            yield ResponseItem(location, index, self._reward_input(prompt, text, stopped))

    def _row_prompt(
        self,
        row: RawRow,
        source: SourceConfig,
    ) -> RowPrompt:
        """Returns the prompt of a row, with an empty text if the row has none. Raises InvalidRow."""
        dialogue = self._conversation(row, source)
        if not dialogue.messages:
            return RowPrompt(
                "",
                dialogue.ground_truth,
                row,
                [],
            )
        prompt_ids: list[int] = []
        if self.with_token_ids:
            (found,) = self.template.prompt_many([dialogue.messages], [dialogue.tools])
            if isinstance(found, InvalidRow):
                raise found
            prompt_ids = found
        return RowPrompt(
            dialogue.messages[-1].content,
            dialogue.ground_truth,
            row,
            prompt_ids,
        )

    def _conversation(
        self,
        row: RawRow,
        source: SourceConfig,
    ) -> Conversation:
        """Returns prompt and gold answer; of a row without a known format those that can be found."""
        formats: list[str] = []
        if source.format != "auto":
            formats.append(source.format)
        # rows that are only scored need not have a format of training data
        with suppress(UserError):
            formats.append(detect_format(row, source.columns, False))
        system = self.recipe.data.system_prompt
        for format_name in formats:
            if format_name in ("preference", "text"):
                continue
            with suppress(InvalidRow):
                parsed = conversation_of(
                    row,
                    source,
                    format_name,
                    system,
                    require_answer=False,
                )
                return Conversation(parsed.prompt, parsed.ground_truth, parsed.tools)
        messages: tuple[Message, ...] = ()
        text = _prompt_text(row, source)
        if text:
            messages = (Message("user", text),)
            if system:
                messages = (Message("system", system), *messages)
        ground_truth = extract_answer(
            row,
            source.columns,
            "gold",
            "",
            accept_bare_number=False,
        )
        return Conversation(messages, ground_truth)

    def _reward_input(
        self,
        prompt: RowPrompt,
        text: str,
        stopped: bool,
    ) -> RewardInput:
        """Returns the input that a run would give its rewards for this text of the policy."""
        num_tokens = len(self.template.tokenizer(text, add_special_tokens=False)["input_ids"])
        answer_ids: list[int] = []
        if self.with_token_ids and len(prompt.prompt_ids):
            answer_ids = encode_answer(self.template, text)
        if answer_ids and not stopped:
            answer_ids = answer_ids[: len(answer_ids) - len(end_of_turn_ids(self.template))]
        ids: Sequence[int] = ()
        if answer_ids:
            ids = [*prompt.prompt_ids, *answer_ids]
        # the end token counts as one too, as in a run
        return RewardInput.of(
            prompt,
            text,
            stopped,
            num_tokens + stopped,
            ids,
        )


def _completion_column(raw: RawRow) -> str:
    for column in COMPLETION_KEYS:
        if raw.get(column) is not None:
            return column
    raise InvalidRow(f"no response: expected one of the columns {', '.join(COMPLETION_KEYS)}")


def _prompt_text(row: RawRow, source: SourceConfig) -> str:
    """Returns the first column with a prompt, else an empty text."""
    for name in PROMPT_COLUMNS:
        value = row.get(source.columns.get(name, name))
        if isinstance(value, str):
            return value
    return ""


def _parse_response(response: Any, row: Mapping[str, Any]) -> tuple[str, bool]:
    """Returns the text of a response, and whether it ended by itself. Raises InvalidRow."""
    text = response
    columns = row
    if isinstance(response, Mapping):
        text = response.get("text", response.get("content"))
        columns = response
    if not isinstance(text, str):
        raise InvalidRow("a response is not a text")
    stopped = columns.get("stopped")
    if isinstance(stopped, bool):
        return text, stopped
    return text, columns.get("finish_reason", "stop") == "stop"
