"""A thin batched decoder: completions as they finish, with the log-probs of the distribution that they were drawn from.

Each sequence has its own random stream, made of the seed, the prompt's number and the sample's number, so what it says does not hang on
its neighbours. Prompts are padded on the left; finished rows leave the batch, and its cache shrinks with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lowrank_tune.model.roles import Roles
from lowrank_tune.types import Completion, Sampling


@dataclass
class _Row:
    prompt: int
    sample: int
    stream: torch.Generator
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class Engine:
    """Decodes with a role. `slots` sequences at once."""

    def __init__(self, roles: Roles, role: str, slots: int = 256) -> None:
        self.roles, self.role, self.slots = roles, role, slots

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Iterator[Completion]:
        """`n` completions of each prompt, in the order in which they finish. Sequences of similar length share a batch."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        jobs = [(index, sample) for index in order for sample in range(n)]
        for start in range(0, len(jobs), self.slots):
            rows = [_Row(index, sample, _stream(sampling.seed, index, sample)) for index, sample in jobs[start : start + self.slots]]
            yield from self._batch(rows, prompts, sampling)

    def _batch(self, rows: list[_Row], prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Completion]:
        device = self.roles.base.device
        width = max(len(prompts[row.prompt]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        attended = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            prompt = torch.tensor(list(prompts[row.prompt]))
            ids[i, width - len(prompt) :] = prompt
            attended[i, width - len(prompt) :] = 1
        ids, attended, cache = ids.to(device), attended.to(device), DynamicCache(config=self.roles.base.model.config)
        while rows:
            # The role is entered for each token anew: between two yields the caller may use another one.
            tokens, logps = self._next_tokens(ids, attended, cache, rows, sampling)
            staying = []
            for i, (row, token, logp) in enumerate(zip(rows, tokens, logps, strict=True)):
                row.ids.append(token)
                row.logps.append(logp)
                stopped = token in sampling.stop_ids
                if stopped or len(row.ids) >= sampling.max_new_tokens:
                    yield Completion(row.prompt, row.sample, row.ids, "stop" if stopped else "length", row.logps)
                else:
                    staying.append(i)
            if len(staying) < len(rows) and staying:
                keep = torch.tensor(staying, device=device)
                cache.batch_select_indices(keep)
                attended = attended[keep]
            rows = [rows[i] for i in staying]
            ids = torch.tensor([[row.ids[-1]] for row in rows], device=device)
            attended = torch.cat([attended, attended.new_ones(len(attended), 1)], dim=1)

    def _next_tokens(self, ids: Tensor, attended: Tensor, cache: Any, rows: list[_Row], sampling: Sampling) -> tuple[list[int], list[float]]:
        roles = self.roles
        positions = (attended.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with roles.quiet(), roles.use(self.role), roles.base.autocast():
            output = roles.base.model.get_decoder()(
                input_ids=ids, attention_mask=attended, position_ids=positions, past_key_values=cache, use_cache=True)  # fmt: skip
        logits = roles.head.logits(output.last_hidden_state[:, -1], sampling.temperature or 1.0)
        logps = torch.log_softmax(logits, dim=-1)
        if sampling.temperature == 0:
            tokens = logps.argmax(dim=-1)
        else:
            uniform = torch.stack([torch.rand((), generator=row.stream, dtype=torch.float64) for row in rows]).to(logps.device)
            cumulative = logps.double().exp().cumsum(dim=-1)
            tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1).clamp_max(logps.shape[1] - 1)
        return tokens.tolist(), logps.gather(1, tokens[:, None]).squeeze(1).tolist()


def _stream(seed: int, prompt: int, sample: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
