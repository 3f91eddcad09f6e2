"""The load-balancing loss of the routers of a mixture of experts (Switch Transformers, arXiv:2101.03961, equations 4 to
6), of each row.

    L = E sum_e f_e P_e

E experts; over all tokens of a row and all layers with a router, f_e is how often expert e is among the chosen ones,
and P_e its mean probability. transformers' `load_balancing_loss_func` computes the same for all rows of a micro-batch
together. A product of means over a micro-batch depends on the split, so here each row has its own loss, and the loss of
an optimizer step is the mean over its rows, weighted by their tokens: any split has one gradient. With rows one by one
both are equal.

Routers are frozen. The gradient reaches the adapters below a router through its input. Only real tokens count.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_tune.batch import Batch
from lowrank_tune.errors import UserError
from lowrank_tune.stats import Stats, WeightedMean

LOSS_FUNCTION = "load_balancing_loss_func"
"""Function of transformers' modules of models that are trained with this loss."""


@dataclass(frozen=True)
class Routers:
    """The routers of a model: modules whose output, or its part `index`, are the logits of the experts."""

    modules: tuple[nn.Module, ...]
    index: int
    top_k: int


def find_routers(model: Any) -> Routers | None:
    """Returns the routers of a model that transformers trains with a load-balancing loss, None without any."""
    if not hasattr(sys.modules[type(model).__module__], LOSS_FUNCTION):
        return None
    recorders: dict[str, Any] = getattr(model.get_decoder(), "_can_record_outputs", None) or {}
    recorder: Any = recorders.get("router_logits")
    router_class = getattr(recorder, "target_class", None)
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if router_class is None or not top_k:
        return None
    modules = tuple(module for module in model.get_decoder().modules() if isinstance(module, router_class))
    return Routers(modules, recorder.index, top_k) if modules else None


def routers_of(model: Any) -> Routers:
    """Returns the routers of a model. Raises UserError without any."""
    routers = find_routers(model)
    if routers is None:
        raise UserError(
            f"train.router_aux_loss_coef: {model.config.model_type} models have no router with a load-balancing loss; "
            "remove it"
        )
    return routers


def row_losses(
    logits: Sequence[Tensor],
    attention_mask: Tensor,
    top_k: int,
) -> Tensor:
    """Returns the load-balancing loss of each row (B,), from the logits of each router (B, T, E) and the mask of real
    tokens (B, T)."""
    mask = attention_mask[..., None]
    chosen: Tensor | int = 0
    probabilities: Tensor | int = 0
    for layer_logits in logits:
        dtype = torch.promote_types(layer_logits.dtype, torch.float32)
        layer_probabilities = layer_logits.masked_fill(~mask, 0.0).softmax(dim=-1, dtype=dtype)
        experts = layer_probabilities.detach().topk(top_k, dim=-1).indices
        layer_chosen = torch.zeros_like(layer_probabilities).scatter_(-1, experts, 1.0)
        chosen = chosen + layer_chosen.masked_fill(~mask, 0.0).sum(dim=1)
        probabilities = probabilities + layer_probabilities.masked_fill(~mask, 0.0).sum(dim=1)
    assert isinstance(chosen, Tensor) and isinstance(probabilities, Tensor), "a model with routers"
    num_choices = attention_mask.sum(dim=1).clamp_min(1) * len(logits)
    return chosen.shape[-1] * (chosen * probabilities).sum(dim=-1) / num_choices.square()


class RouterLoss:
    """The load-balancing loss of the passes with gradients of one role, times `coefficient`.

    `num_tokens` are the tokens of all rows of the optimizer step, which must be set before it.
    """

    def __init__(
        self,
        routers: Routers,
        role: str,
        coefficient: float,
    ) -> None:
        self.routers = routers
        self.role = role
        self.coefficient = coefficient
        self.num_tokens = 1
        self._last_pass: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def recording(
        self,
        role: str,
        batch: Batch,
    ) -> Iterator[None]:
        """Computes the losses of a pass of the decoder over the rows of a batch, if the role is trained in it. Rows may
        not be packed."""
        self.discard()
        if role != self.role or not torch.is_grad_enabled():
            yield
            return
        logits: dict[nn.Module, list[Tensor]] = {module: [] for module in self.routers.modules}
        with ExitStack() as hooks:
            for module in self.routers.modules:
                hooks.callback(module.register_forward_hook(partial(self._store, logits)).remove)
            yield
        rows = len(batch)
        layers = [_joined_chunks(chunks, rows) for chunks in logits.values()]
        losses = row_losses(
            layers,
            batch.attention_mask,
            self.routers.top_k,
        )
        self._last_pass = losses, batch.attention_mask.sum(dim=1)

    def _store(
        self,
        logits: Mapping[nn.Module, list[Tensor]],
        module: nn.Module,
        inputs: Any,
        output: Any,
    ) -> None:
        # Nothing is computed here: in a recomputed layer, autograd counts the tensors that a forward pass saves, and
        # the recomputation has no hook.
        logits[module].append(output if isinstance(output, Tensor) else output[self.routers.index])

    def discard(self) -> None:
        """Forgets the last pass, and so frees its graph."""
        self._last_pass = None

    def take(self) -> tuple[Tensor, Stats] | None:
        """Returns the loss of the last pass, a sum over its rows, and the metric; None without such a pass since the
        last call."""
        if self._last_pass is None:
            return None
        losses, lengths = self._last_pass
        self.discard()
        total = (losses * lengths).sum()
        metric = WeightedMean(total.detach(), lengths.sum())
        return self.coefficient * total / self.num_tokens, {"router_aux_loss": metric}


def _joined_chunks(chunks: Sequence[Tensor], rows: int) -> Tensor:
    """Returns the logits (B, T, E) of a router, whose MLP runs in one or more chunks of the sequence."""
    return torch.cat([chunk.reshape(rows, -1, chunk.shape[-1]) for chunk in chunks], dim=1)
