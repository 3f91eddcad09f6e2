"""The learned reward: where its adapter lies, what it reads, and its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lowrank_tune.batch import Row
from lowrank_tune.data import ChatTemplate, InvalidRow, collate
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.model.adapters import SavedAdapter
from lowrank_tune.model.base import combined_hash, hash_of
from lowrank_tune.model.roles import Roles

REWARD_ROLE = "reward"
PROBE_PROMPT = (Message("user", "Who asks?"),)


def reward_model_base(saved: Mapping[str, SavedAdapter], lower: Sequence[str]) -> list[str]:
    """The frozen adapters under the reward model, of those that lie under the policy: the very ones that it was trained
    over, by content.

    Raises UserError where one of them is not there. An adapter that does not lie in a run is taken to stand on the base
    itself.
    """
    reward = saved[REWARD_ROLE]
    names_by_hash = {
        combined_hash({key: hash_of(tensor.float()) for key, tensor in saved[name].tensors.items()}): name
        for name in lower
    }
    lineage = _reward_model_lineage(reward.folder)
    missing = [name for name, content in lineage.items() if content not in names_by_hash]
    if missing:
        raise UserError(
            f"adapters.{REWARD_ROLE}.path: the reward model in {reward.folder} was trained over the adapter "
            f"`{missing[0]}`, which this recipe does not load below its policy: add `adapters.{missing[0]}.path`, "
            f"above `{REWARD_ROLE}`"
        )
    return [names_by_hash[content] for content in lineage.values()]


def _reward_model_lineage(folder: Path) -> Mapping[str, str]:
    """The frozen adapters of the run that an adapter lies in, lowest first, each with the hash of its content."""
    for parent in list(folder.resolve().parents)[:3]:
        try:
            facts = json.loads((parent / "base.json").read_bytes())
        except OSError:
            continue
        except ValueError:
            return {}
        adapters = facts.get("adapters") if isinstance(facts, dict) else None
        return adapters if isinstance(adapters, dict) else {}
    return {}


def encode_answer(template: ChatTemplate, text: str) -> list[int]:
    """What the base reads behind a prompt, any prompt, where the assistant says this; nothing where the template
    refuses it."""
    row = template.encode_many([(*PROBE_PROMPT, Message("assistant", text))])[0]
    if isinstance(row, InvalidRow):
        return []
    return list(row.input_ids[len(template.prompt(PROBE_PROMPT)) :])


def end_of_turn_ids(template: ChatTemplate) -> list[int]:
    """All that the template writes behind an answer's words, its end tokens first: a reward model was trained to score
    at the last of it."""
    token_ids = encode_answer(template, "You do.")
    return token_ids[
        next((index for index, token in enumerate(token_ids) if token in template.end_ids), len(token_ids)) :
    ]


def append_end_of_turn(token_ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """A completion as the reward model was trained to read it: decoding stops at the first end token, and the rest of
    `end_ids` follows. One that was cut stays as it is."""
    index = next((index for index, token in enumerate(end_ids) if token_ids and token_ids[-1] == token), None)
    return [*token_ids, *(() if index is None else end_ids[index + 1 :])]


def score_rows(
    roles: Roles,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    micro_tokens: int,
    role: str = REWARD_ROLE,
) -> list[float]:
    """The role's score of each row, batched by length."""
    result = [0.0] * len(rows)

    def read(part: Sequence[int]) -> list[float]:
        batch = collate([Row(rows[index], [False] * len(rows[index])) for index in part], pad_id).to(roles.base.device)
        with roles.inference_mode():
            return torch.as_tensor(roles.sequence_scores(role, batch)).tolist()

    pending = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while pending:
        count = max(1, micro_tokens // max(1, len(rows[pending[0]])))
        part = pending[:count]
        pending = pending[count:]
        for some, scores in roles.limits.split_on_oom("forward_tokens", part, len(rows[part[0]]), read):
            for index, score in zip(some, scores, strict=True):
                result[index] = score
    return result
