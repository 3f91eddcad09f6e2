"""`lowrank-tune score PRESET|FILE`: the rewards of a recipe over a file of completions, or over the reference
answers of its own data.

A row of the file is a row of the data with the model's own words beside it, in the first of `completions` (a list),
`responses`, `completion` or `response`: a text, or an object with `text` and perhaps `finish_reason` or `stopped`. All
other columns are the data's, read as the recipe's first source says; a row without a question is scored without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_tune.assembly import load_roles
from lowrank_tune.assembly.reward_model import REWARD_ROLE, encode_answer, end_of_turn_ids, score_rows
from lowrank_tune.assembly.rl import make_row_check
from lowrank_tune.assembly.rope import select_rope
from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.data import ChatTemplate, Conversation, InvalidRow, detect_format, load_prompts, read_source
from lowrank_tune.data.encode import conversation_of
from lowrank_tune.data.formats import RawRow
from lowrank_tune.data.ground_truth import extract_answer
from lowrank_tune.data.message import Message
from lowrank_tune.data.preference_pairs import PROMPT_COLUMNS
from lowrank_tune.data.report import DroppedRows
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Progress
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.model.base import load_base, load_tokenizer
from lowrank_tune.model.rotary import factors_of
from lowrank_tune.rewards import RewardInput, Score, WeightedReward, WorkerPool, build_rewards, row_rejection_reason
from lowrank_tune.rewards.reward_model import RewardModel
from lowrank_tune.rewards.verdicts import exceeds_failure_limit, score_all

COMPLETION_KEYS = ("completions", "responses", "completion", "response")
MICRO_TOKENS = 1 << 14


@dataclass(frozen=True)
class ResponseItem:
    """One response: the location of its row, its number among the row's completions (from 1), and the input of the
    rewards."""

    location: str
    index: int
    reward_input: RewardInput


@dataclass
class CompletionScores:
    """Scores of the rewards, in the order of `responses`; fewer if `interrupted`. `dropped` are rows without a usable
    response."""

    weighted: list[WeightedReward]
    responses: list[ResponseItem]
    max_failure_rate: float
    dropped: dict[str, DroppedRows] = field(default_factory=dict)
    scores: list[list[Score]] = field(default_factory=list)
    interrupted: bool = False

    def stop_reason(self) -> str | None:
        """Why a run would stop at these failures; None if it would not."""
        return exceeds_failure_limit(self.weighted, self.scores, self.max_failure_rate)

    def to_records(self) -> Iterator[dict[str, Any]]:
        """One object a response, for a file."""
        for response, scores in zip(self.responses, self.scores, strict=False):
            rewards = {
                weighted_reward.name: {
                    "value": score.value,
                    "verdict": score.verdict,
                    "reason": score.reason,
                    "seconds": round(score.seconds, 6),
                }
                for weighted_reward, score in zip(self.weighted, scores, strict=True)
            }
            values = [
                weighted_reward.weight * score.value
                for weighted_reward, score in zip(self.weighted, scores, strict=True)
                if score.value is not None
            ]
            reward = sum(values) if len(values) == len(scores) else None
            yield {"location": response.location, "number": response.index, "reward": reward, "rewards": rewards}


def score_completions(
    recipe: RecipeConfig,
    file: str | None,
    limit: int | None,
    emit: Emit,
    device: torch.device | None = None,
) -> CompletionScores:
    """Scores every response. Raises UserError if there is none, or a reward cannot be built; Ctrl-C keeps the scores
    so far."""
    if not recipe.rewards:
        raise UserError(
            f"{recipe.name or 'this recipe'} has no rewards: `algorithm: {recipe.algorithm}` learns from its rows alone"
        )
    weighted = build_rewards(recipe.rewards, Path.cwd())
    reward_models = [reward.reward for reward in weighted if isinstance(reward.reward, RewardModel)]
    if reward_models and REWARD_ROLE not in recipe.adapters:
        raise UserError(
            "`reward_model` needs the adapter of an earlier stage of this chain, and only a run has it: name it with "
            f"stages.{recipe.name}.adapters.{REWARD_ROLE}.path=RUN/N-NAME"
        )
    template = ChatTemplate.from_tokenizer(load_tokenizer(recipe.base), recipe.data.template_date)
    reader = ResponseReader(recipe, template, bool(reward_models))
    result = CompletionScores(weighted, [], recipe.rollout.max_reward_failure_rate)
    if file is None:
        result.responses = reader.references(emit)
    else:
        result.responses = reader.responses(file, weighted, result.dropped)
    result.responses = result.responses[:limit]
    if reward_models:
        _attach_base_model(recipe, reward_models, reader.template, device, emit)
    with WorkerPool[int]([reward.reward for reward in weighted]) as scorer:
        _score_responses(result, scorer, emit)
    return result


def _score_responses(result: CompletionScores, scorer: WorkerPool[int], emit: Emit) -> None:
    total = len(result.responses)
    try:
        emit(Progress(description="scoring", done=0, total=total))
        for scores in score_all(
            scorer,
            [response.reward_input for response in result.responses],
            lambda done: emit(Progress(description="scoring", done=done, total=total)),
        ):
            result.scores.append(scores)
    except KeyboardInterrupt:
        result.interrupted = True


def _attach_base_model(
    recipe: RecipeConfig,
    reward_models: list[RewardModel],
    template: ChatTemplate,
    device: torch.device | None,
    emit: Emit,
) -> None:
    """Loads the base, so that the learned rewards can read."""
    saved = {
        name: read_adapter(adapter.path, f"adapters.{name}.path", head=name == REWARD_ROLE)
        for name, adapter in recipe.adapters.items()
        if adapter.path
    }
    emit(Progress(description=f"loading {recipe.base.model}", done=0, total=1))
    factors = factors_of(select_rope((recipe,), emit))
    base = load_base(recipe.base, template.tokenizer, device, rope_factors=factors)
    inference_recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"gradient_checkpointing": False})}
    )
    roles = load_roles(inference_recipe, base, saved, emit)
    emit(Progress(description=f"loading {recipe.base.model}", done=1, total=1))
    for reward in reward_models:
        reward.score_batch = lambda rows: score_rows(roles, rows, template.pad_id, MICRO_TOKENS)


@dataclass
class ResponseReader:
    """Responses from rows. `with_token_ids`: also as the base reads them."""

    recipe: RecipeConfig
    template: ChatTemplate
    with_token_ids: bool

    def references(self, emit: Emit) -> list[ResponseItem]:
        """The reference answers of the recipe's own data."""
        prompts = load_prompts(
            self.recipe.data,
            self.template,
            self.recipe.seed,
            emit,
            needs_ground_truth=self.recipe.needs_ground_truth,
            unusable=make_row_check(self.recipe),
        )
        responses = [
            ResponseItem(
                str(location),
                1,
                self._reward_input(prompt.text, prompt.answer, prompt.ground_truth, prompt.row, True, prompt.input_ids),
            )
            for location, prompt in zip(prompts.locations, prompts.examples, strict=True)
            if prompt.answer
        ]
        if not responses:
            raise UserError("the rows of `data.train` hold no reference answers; give responses with --file")
        return responses

    def responses(
        self,
        file: str,
        weighted: list[WeightedReward],
        dropped: dict[str, DroppedRows],
    ) -> list[ResponseItem]:
        """Those of a file; rows that hold none, or that no reward can score, go to `dropped`."""
        first = self.recipe.data.train[0]
        source = SourceConfig(dataset=file)
        responses = list[ResponseItem]()
        if not first.dataset.startswith("builtin:arithmetic"):
            source = source.model_copy(
                update={"format": first.format, "columns": first.columns, "ground_truth": first.ground_truth}
            )
        for location, raw in read_source(source, self.recipe.seed):
            try:
                if isinstance(raw, InvalidRow):
                    raise raw
                row_responses = list(self._responses_of_row(raw, source, str(location)))
                if reject_reason := row_rejection_reason(weighted, row_responses[0].reward_input):
                    raise InvalidRow(reject_reason)
                responses += row_responses
            except InvalidRow as fault:
                dropped.setdefault(fault.reason, DroppedRows()).add(str(location))
        if not responses:
            reason, rows_dropped = max(dropped.items(), key=lambda entry: entry[1].count)
            raise UserError(f"{file}: none of its rows can be scored: {reason} ({rows_dropped.locations[0]})")
        return responses

    def _responses_of_row(self, raw: RawRow, source: SourceConfig, location: str) -> Iterator[ResponseItem]:
        """The responses of one row. Raises InvalidRow."""
        if not isinstance(raw, Mapping):
            raise InvalidRow("not an object with columns")
        name = next((column for column in COMPLETION_KEYS if raw.get(column) is not None), None)
        if name is None:
            raise InvalidRow(f"no response: expected one of the columns {', '.join(COMPLETION_KEYS)}")
        row = {key: value for key, value in raw.items() if key != name}
        dialogue = self._conversation(row, source)
        if self.with_token_ids and dialogue.messages:
            prompt_ids = self._prompt_ids(dialogue.messages)
        else:
            prompt_ids = []
        completions = raw[name] if isinstance(raw[name], list) else [raw[name]]
        if not completions:
            raise InvalidRow(f"`{name}` is empty")
        for index, completion in enumerate(completions, 1):
            text, stopped = _parse_response(completion, raw)
            yield ResponseItem(
                location,
                index,
                self._reward_input(
                    dialogue.messages[-1].content if dialogue.messages else "",
                    text,
                    dialogue.ground_truth,
                    row,
                    stopped,
                    prompt_ids,
                ),
            )

    def _conversation(self, row: RawRow, source: SourceConfig) -> Conversation:
        """What was asked, and the gold answer; of a row of no known shape what can be found."""
        shapes: list[str] = [source.format] if source.format != "auto" else []
        with suppress(UserError):  # no shape that data could have: it need not, for nothing is learned from it
            shapes.append(detect_format(row, source.columns, False))
        for shape in shapes:
            if shape != "preference":
                parsed = conversation_of(row, source, shape, self.recipe.data.system_prompt, require_answer=False)
            else:
                parsed = None
            if isinstance(parsed, Conversation):
                if parsed.messages[-1].role == "assistant":
                    messages = parsed.messages[:-1]
                else:
                    messages = parsed.messages
                return Conversation(messages, parsed.ground_truth)
        text = next(
            (value for name in PROMPT_COLUMNS if isinstance(value := row.get(source.columns.get(name, name)), str)),
            None,
        )
        if self.recipe.data.system_prompt:
            system_messages = [Message("system", self.recipe.data.system_prompt)]
        else:
            system_messages = []
        return Conversation(
            (*system_messages, Message("user", text)) if text else (),
            extract_answer(row, source.columns, "gold", "", accept_bare_number=False),
        )

    def _prompt_ids(self, messages: tuple[Message, ...]) -> list[int]:
        try:
            return self.template.prompt(messages)
        except UserError as error:
            raise InvalidRow(str(error)) from error

    def _reward_input(
        self,
        prompt: str,
        text: str | None,
        gold: str | None,
        row: Mapping[str, Any],
        ended_with_eos: bool,
        prompt_ids: Any,
    ) -> RewardInput:
        """As a run would have it, had the policy written this."""
        text = text or ""
        num_tokens = len(self.template.tokenizer(text, add_special_tokens=False)["input_ids"]) + ended_with_eos
        if self.with_token_ids and len(prompt_ids):
            answer_tokens = encode_answer(self.template, text)
        else:
            answer_tokens = []
        if answer_tokens and not ended_with_eos:
            answer_tokens = answer_tokens[: len(answer_tokens) - len(end_of_turn_ids(self.template))]
        return RewardInput(
            prompt,
            text,
            gold,
            row,
            ended_with_eos,
            num_tokens,
            [*prompt_ids, *answer_tokens] if answer_tokens else (),
        )


def _parse_response(response: Any, row: Mapping[str, Any]) -> tuple[str, bool]:
    """A response's words, and whether it ended by itself. Raises InvalidRow."""
    fields = response if isinstance(response, Mapping) else row
    if isinstance(response, Mapping):
        text = response.get("text", response.get("content"))
    else:
        text = response
    if not isinstance(text, str):
        raise InvalidRow("a response is no text")
    stopped = fields.get("stopped")
    return text, stopped if isinstance(stopped, bool) else fields.get("finish_reason", "stop") == "stop"
