"""The learned reward: where its adapter lies, what it reads, and its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lowrank_tune.data import RowFault, Template, collate
from lowrank_tune.errors import UserError
from lowrank_tune.model.adapters import SavedAdapter
from lowrank_tune.model.base import hash_of, one_hash
from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Message, Row

ROLE = "reward"
ASKED = (Message("user", "Who asks?"),)


def below_reward(saved: Mapping[str, SavedAdapter], lower: Sequence[str]) -> list[str]:
    """The frozen adapters under the reward model, of those that lie under the policy: the very ones that it was trained
    over, by content.

    Raises UserError where one of them is not there. An adapter that does not lie in a run is taken to stand on the base
    itself.
    """
    reward = saved[ROLE]
    mine = {
        one_hash({key: hash_of(tensor.float()) for key, tensor in saved[name].tensors.items()}): name for name in lower
    }
    trained_over = _trained_over(reward.folder)
    missing = [name for name, content in trained_over.items() if content not in mine]
    if missing:
        raise UserError(
            f"adapters.{ROLE}.path: the reward model in {reward.folder} was trained over the adapter `{missing[0]}`, "
            f"which this "
            f"recipe does not load below its policy: add `adapters.{missing[0]}.path`, above `{ROLE}`"
        )
    return [mine[content] for content in trained_over.values()]


def _trained_over(folder: Path) -> Mapping[str, str]:
    """The frozen adapters of the run that an adapter lies in, lowest first, each with the hash of its content."""
    for place in list(folder.resolve().parents)[:3]:
        try:
            found = json.loads((place / "base.json").read_bytes())
        except OSError:
            continue
        except ValueError:
            return {}
        adapters = found.get("adapters") if isinstance(found, dict) else None
        return adapters if isinstance(adapters, dict) else {}
    return {}


def answer_ids(template: Template, text: str) -> list[int]:
    """What the base reads behind a prompt, any prompt, where the assistant says this; nothing where the template
    refuses it."""
    row = template.encode_many([(*ASKED, Message("assistant", text))])[0]
    return [] if isinstance(row, RowFault) else list(row.ids[len(template.prompt(ASKED)) :])


def closing(template: Template) -> list[int]:
    """All that the template writes behind an answer's words, its end tokens first: a reward model was trained to score
    at the last of it."""
    said = answer_ids(template, "You do.")
    return said[next((place for place, token in enumerate(said) if token in template.end_ids), len(said)) :]


def closed(ids: Sequence[int], end: Sequence[int]) -> list[int]:
    """A completion as the reward model was trained to read it: decoding stops at the first end token, and the rest of
    `end` follows. One that was cut stays as it is."""
    place = next((place for place, token in enumerate(end) if ids and ids[-1] == token), None)
    return [*ids, *(() if place is None else end[place + 1 :])]


def score_rows(
    roles: Roles, rows: Sequence[Sequence[int]], pad_id: int, micro_tokens: int, role: str = ROLE
) -> list[float]:
    """The role's score of each row, batched by length."""
    found = [0.0] * len(rows)

    def read(part: Sequence[int]) -> list[float]:
        batch = collate([Row(rows[place], [False] * len(rows[place])) for place in part], pad_id).to(roles.base.device)
        with roles.quiet():
            return torch.as_tensor(roles.last_scores(role, batch)).tolist()

    waiting = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    while waiting:
        count = max(1, micro_tokens // max(1, len(rows[waiting[0]])))
        part, waiting = waiting[:count], waiting[count:]
        for some, scores in roles.limits.pieces("forward_tokens", part, len(rows[part[0]]), read):
            for place, score in zip(some, scores, strict=True):
                found[place] = score
    return found
