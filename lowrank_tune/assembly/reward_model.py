"""The learned reward: the stack of its adapter, the token ids that it reads, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lowrank_tune.batch import Row
from lowrank_tune.data import ChatTemplate, InvalidRow, collate
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.json_files import read_json
from lowrank_tune.model.adapters import SavedAdapter
from lowrank_tune.model.base import combined_hash, hash_of
from lowrank_tune.model.roles import Roles

REWARD_ROLE = "reward"
PROBE_PROMPT = (Message("user", "Who asks?"),)
"""Any prompt: what the template adds after an answer does not depend on it."""


def content_hash(adapter: SavedAdapter) -> str:
    """Returns a hash of the tensors of an adapter in fp32, which identifies it in the lineage of others."""
    return combined_hash({key: hash_of(tensor.float()) for key, tensor in adapter.tensors.items()})


def reward_model_base(saved: Mapping[str, SavedAdapter], lower: Sequence[str]) -> list[str]:
    """Returns the names of the frozen adapters below the reward model, lowest first: those that it was trained over,
    identified by content among the adapters `lower` below the policy.

    An adapter outside the folder of a run is assumed to be trained on the base alone. Raises UserError if the recipe
    does not load one of them.
    """
    reward = saved[REWARD_ROLE]
    names_by_hash = {content_hash(saved[name]): name for name in lower}
    lineage = _reward_model_lineage(reward.folder)
    for name, content in lineage.items():
        if content not in names_by_hash:
            raise UserError(
                f"adapters.{REWARD_ROLE}.path: the reward model in {reward.folder} was trained over the adapter "
                f"`{name}`, which this recipe does not load below its policy: add `adapters.{name}.path`, above "
                f"`{REWARD_ROLE}`"
            )
    return [names_by_hash[content] for content in lineage.values()]


def _reward_model_lineage(folder: Path) -> Mapping[str, str]:
    """Returns the content hashes of the frozen adapters of the run that contains an adapter, by name, lowest first;
    none outside a run."""
    for parent in list(folder.resolve().parents)[:3]:
        try:
            facts = read_json(parent / "base.json")
        except OSError:
            continue
        except ValueError:
            return {}
        adapters = facts.get("adapters") if isinstance(facts, dict) else None
        return adapters if isinstance(adapters, dict) else {}
    return {}


def encode_answer(template: ChatTemplate, text: str) -> list[int]:
    """Returns the token ids of an assistant's message after a prompt; none if the template rejects the message."""
    row = template.encode_many([(*PROBE_PROMPT, Message("assistant", text))])[0]
    if isinstance(row, InvalidRow):
        return []
    prompt_length = len(template.prompt(PROBE_PROMPT))
    return list(row.input_ids[prompt_length:])


def end_of_turn_ids(template: ChatTemplate) -> list[int]:
    """Returns all token ids that the template adds after the text of an answer, the end token first. A reward model is
    trained to score at the last of them."""
    token_ids = encode_answer(template, "You do.")
    for index, token in enumerate(token_ids):
        if token in template.end_ids:
            return token_ids[index:]
    return []


def append_end_of_turn(token_ids: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Returns a completion with the rest of `end_ids`, as in the training data of the reward model: decoding stops at
    the first end token. A truncated completion is returned as it is."""
    for index, token in enumerate(end_ids):
        if token_ids and token_ids[-1] == token:
            return [*token_ids, *end_ids[index + 1 :]]
    return list(token_ids)


def score_rows(
    roles: Roles,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    micro_tokens: int,
    role: str = REWARD_ROLE,
) -> list[float]:
    """Returns the score of each row of token ids, computed in batches of similar length."""
    scores = [0.0] * len(rows)

    def compute(indices: Sequence[int]) -> list[float]:
        unmasked_rows = [Row(rows[index], [False] * len(rows[index])) for index in indices]
        batch = collate(unmasked_rows, pad_id).to(roles.base.device)
        with roles.inference_mode():
            return torch.as_tensor(roles.sequence_scores(role, batch)).tolist()

    lengths = [len(row) for row in rows]
    for indices, values in roles.limits.forward_batches(lengths, micro_tokens, compute):
        for index, value in zip(indices, values, strict=True):
            scores[index] = value
    return scores
