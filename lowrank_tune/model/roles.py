"""Roles: stacks of LoRA adapters over one frozen base, some with a scalar head. PEFT lives here and nowhere else.

Every tuner layer shares one list of active adapters, and entering a role rewrites that list in place: half a
microsecond, and `requires_grad` is never touched (PEFT's own switches touch it, and lose gradients in silence). An
empty stack is the base, bit for bit. Under gradient checkpointing the recomputation enters the stack that ran the
forward pass, whatever is active by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowrank_tune.batch import Batch
from lowrank_tune.errors import UserError
from lowrank_tune.model import heads as scalar
from lowrank_tune.model.activation_checkpointing import Checkpointing, checkpoint_layers, disable_checkpointing
from lowrank_tune.model.base import Base, num_stored_bytes
from lowrank_tune.model.logprobs import LogProbs, check_head, chunked_entropy, chunked_kl, chunked_logps, head_of
from lowrank_tune.model.oom import MemoryLimits
from lowrank_tune.model.prefix_sharing import (
    PackedBatch,
    longest_shareable,
    mask_for,
    pack_shared_prefixes,
    verify_packing,
)

ADAPTER_PREFIX = "lt_"  # PEFT drops weights of an adapter whose name is part of a module's name


class _ActiveAdapters(AbstractContextManager[None]):
    """Makes a stack the active one and puts back what was there. Can be entered again and again, as a second backward
    pass does."""

    def __init__(self, active: list[str], stack: Iterable[str]) -> None:
        self.active = active
        self.stack = list(stack)
        self.before = list[list[str]]()

    def __enter__(self) -> None:
        self.before.append(self.active[:])
        self.active[:] = self.stack

    def __exit__(self, *_: object) -> None:
        self.active[:] = self.before.pop()


class Roles:
    """Adapters over a base, and the stacks of them that speak.

    `adapters` in the order they lie, all fresh (and a fresh adapter changes nothing: its B is zero) until
    `load_adapter_tensors`. Only those in `trainable` ever get a gradient. `heads` are roles with a scalar head: it
    belongs to the adapter of the role's own name, the top of its stack, and trains and is saved with it; or, where no
    adapter has that name, it stands alone on a stack that others train. `share_prefixes` False has every row go through
    the model whole, as it must where another backend ignores masks. `checkpointing` says which layers are recomputed in
    the backward pass, `offload` that what they keep waits in the machine's memory
    (`model/activation_checkpointing.py`).
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, LoraConfig],
        trainable: Iterable[str],
        stacks: Mapping[str, list[str]],
        checkpointing: Checkpointing = False,
        seed: int = 0,
        heads: Iterable[str] = (),
        offload: bool = False,
    ) -> None:
        self.base = base
        self.stacks = {role: [ADAPTER_PREFIX + name for name in stack] for role, stack in stacks.items()}
        self.trainable = frozenset(trainable)
        self.share_prefixes = base.backend == "transformers"
        self.heads = dict[str, scalar.ScalarHead]()
        self._checkpointing = False
        self.limits = MemoryLimits()
        self._active: list[str] = []
        torch.manual_seed(seed)
        self._peft: Any = None
        for name, config in adapters.items():
            try:
                if self._peft is None:
                    self._peft = PeftModel(base.model, config, adapter_name=ADAPTER_PREFIX + name)
                else:
                    self._peft.add_adapter(ADAPTER_PREFIX + name, config)
            except (ValueError, TypeError) as error:  # of a loaded one: fresh configurations were made for this base
                raise UserError(
                    f"adapters.{name}: this adapter does not fit {base.name}: {str(error).splitlines()[0]}"
                ) from error
        assert self._peft is not None, "roles without an adapter"
        # logits are made from its frozen weight, often the embedding's too
        if isinstance(base.model.get_output_embeddings(), LoraLayer):
            self.unload_adapters()
            raise UserError(
                f"adapters: one of them changes the output head of {base.name}, which this kit keeps as it is"
            )
        self.head = head_of(base.model)
        self.heads = {role: scalar.ScalarHead(self.head.weight.shape[1], base.device) for role in heads}
        alone = self.trainable - adapters.keys()
        assert all(role in alone or self.stacks[role][-1:] == [ADAPTER_PREFIX + role] for role in self.heads), (
            "a head belongs to the top adapter of its own role, or is trained alone"
        )
        self._share_active_list()
        self._freeze_all_but_trainable()
        self._checkpoint(checkpointing, offload)
        with self.activate("base"):
            check_head(base.model, self.head)

    def activate(self, role: str) -> AbstractContextManager[None]:
        """Enter a role: a name in `stacks`, or `base` for no adapter at all."""
        return _ActiveAdapters(self._active, [] if role == "base" else self.stacks[role])

    @contextmanager
    def inference_mode(self) -> Iterator[None]:
        """No graph, no dropout: eval mode inside, the mode before restored after (checkpointing works only in train
        mode)."""
        before = self.base.model.training
        self.base.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.base.model.train(before)

    def resident_bytes(self) -> int:
        """What stays on the device for the whole run: the base as it is stored, adapters and heads, and two moments of
        what is trained."""
        size = sum(
            num_stored_bytes(parameter) for parameter in (*self.base.model.parameters(), *self.base.model.buffers())
        )
        trained = sum(parameter.nbytes for _, parameter in self._all_parameters() if parameter.requires_grad)
        return size + 2 * trained + sum(head.weight.nbytes for head in self.heads.values())

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of a role, in the order of `named_parameters`."""
        return list(self.named_parameters(role).values())

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The same by name, a scalar head last."""
        if role in self.heads:
            top = ADAPTER_PREFIX + role
        else:
            top = self.stacks[role][-1]
        return {name: p for name, p in self._all_parameters() if p.requires_grad and f".{top}." in name}

    def _all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._peft.named_parameters()
        for role, head in self.heads.items():
            yield f"score.{ADAPTER_PREFIX}{role}.weight", head.weight

    def hidden(self, role: str, batch: Batch) -> Tensor:
        """(B, T, d) last hidden states. A beginning that rows share goes through once where that is faster
        (`model/prefix_sharing.py`).

        Right-padded rows need no attention mask: a real token never looks at what follows it.
        """
        layout = self._packed_layout(batch)
        with self.activate(role):
            if layout is not None:
                return layout.unpack(self._run_decoder(layout.input_ids, layout.attention_mask, layout.position_ids))
            attention_mask = batch.attention_mask
            mask = None
            positions = None
            if not bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all()):
                mask = attention_mask.long()
                positions = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
            return self._run_decoder(batch.input_ids.masked_fill(~attention_mask, 0), mask, positions)

    def _run_decoder(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        if mask is not None and mask.ndim == 4:
            mask = mask_for(mask, self.base.model)
        with self.base.autocast():
            decoder = self.base.model.get_decoder()
            return decoder(  # type: ignore[no-any-return]
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state

    def _packed_layout(self, batch: Batch) -> PackedBatch | None:
        if not self.share_prefixes or batch.shared_prefix is None:
            return None
        layout = pack_shared_prefixes(batch, self.head.weight.shape[1])
        if layout is not None and batch.input_ids.shape[1] <= self._longest_shareable:
            return layout
        return None

    @cached_property
    def _longest_shareable(self) -> int:
        model = self.base.model
        longest = longest_shareable(model.config)
        if longest:
            with self.inference_mode(), self.activate("base"):
                longest *= verify_packing(self._run_decoder, self.head.weight.shape[0], model.dtype, self.base.device)
        return longest

    def logps(self, role: str, batch: Batch, temperature: float = 1.0, entropy_gradient: bool = False) -> LogProbs:
        """log p(token t | before) and entropy where `completion_mask`, else 0; (B, T) fp32. The shift by one happens
        here."""
        logps, entropy, _ = self.token_logps_and_entropy(role, batch, temperature, entropy_gradient)
        return LogProbs(logps, entropy)

    def token_logps_and_entropy(
        self,
        role: str,
        batch: Batch,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and entropies as `logps`, and whether the token is the likeliest one; (B, T) each. Entropies have a
        gradient only where one is asked for: it costs a second pass through the head."""
        rows, columns = batch.loss_mask.nonzero(as_tuple=True)
        hidden = self.hidden(role, batch)[rows, columns - 1]
        values = chunked_logps(self.head, hidden, batch.input_ids[rows, columns], temperature)
        if entropy_gradient:
            values = values[0], chunked_entropy(self.head, hidden, temperature), values[2]
        return tuple(_scatter(value, rows, columns, batch.input_ids.shape) for value in values)  # type: ignore[return-value]

    def full_vocab_kl(
        self,
        role: str,
        reference: str,
        batch: Batch,
        temperature: float = 1.0,
        gradient: bool = False,
    ) -> Tensor:
        """KL(role || reference) over the whole vocabulary where `completion_mask`, else 0; (B, T) fp32; with
        `gradient`, one for the role."""
        rows, columns = batch.loss_mask.nonzero(as_tuple=True)
        with nullcontext() if gradient else self.inference_mode():
            role_hidden = self.hidden(role, batch)[rows, columns - 1]
        with self.inference_mode():
            reference_hidden = self.hidden(reference, batch)[rows, columns - 1]
        return _scatter(
            chunked_kl(self.head, role_hidden, reference_hidden, temperature),
            rows,
            columns,
            batch.input_ids.shape,
        )

    def scores(self, role: str, batch: Batch) -> Tensor:
        """The scalar head's value at every attended token, else 0; (B, T) fp32."""
        rows, columns = batch.attention_mask.nonzero(as_tuple=True)
        return _scatter(self.heads[role](self.hidden(role, batch)[rows, columns]), rows, columns, batch.input_ids.shape)

    def sequence_scores(self, role: str, batch: Batch) -> Tensor:
        """The scalar head's value at each row's last attended token, whatever token that is and wherever padding
        stands; (B,) fp32."""
        last = (batch.lengths - 1).clamp_min(0)
        rows = torch.arange(len(batch), device=last.device)
        return self.heads[role](self.hidden(role, batch)[rows, last])  # type: ignore[no-any-return]

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's weights, its head's too, under the names of PEFT's file format. They are counted: none may be
        lost."""
        tensors = {}
        if ADAPTER_PREFIX + name in self._peft.peft_config:
            tensors = get_peft_model_state_dict(
                self._peft,
                adapter_name=ADAPTER_PREFIX + name,
                save_embedding_layers=False,
            )
        if name in self.heads:
            tensors[scalar.HEAD_WEIGHT_KEY] = self.heads[name].weight
        expected = sum(f".{ADAPTER_PREFIX}{name}." in key for key, _ in self._all_parameters())
        assert len(tensors) == expected, f"adapter {name}: {len(tensors)} tensors to save, {expected} in the model"
        return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}

    def load_adapter_tensors(self, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
        """Puts weights into an adapter. Raises UserError where names or shapes do not fit this base."""
        current_tensors = self.adapter_tensors(name)
        wrong = sorted(
            key
            for key in current_tensors.keys() | tensors.keys()
            if _tensor_shape(current_tensors, key) != _tensor_shape(tensors, key)
        )
        if wrong:
            shapes = [_tensor_shape(named, wrong[0]) for named in (tensors, current_tensors)]
            first = f"{wrong[0]} is {shapes[0]} there and {shapes[1]} here"
            raise UserError(
                f"{where}: this adapter was made for another base than {self.base.name}: {len(wrong)} tensors "
                f"differ; {first}"
            )
        if name in self.heads:
            with torch.no_grad():
                self.heads[name].weight.copy_(tensors[scalar.HEAD_WEIGHT_KEY])
        lora = {key: tensor for key, tensor in tensors.items() if key != scalar.HEAD_WEIGHT_KEY}
        if lora:
            set_peft_model_state_dict(self._peft, lora, adapter_name=ADAPTER_PREFIX + name)
            self._share_active_list()
            self._freeze_all_but_trainable()

    def scalings(self, name: str) -> dict[str, float]:
        """What an adapter's product B A is multiplied by, of each module that it changes."""
        return {
            module_name: float(module.scaling[ADAPTER_PREFIX + name])
            for module_name, module in self.base.model.named_modules()
            if isinstance(module, LoraLayer) and ADAPTER_PREFIX + name in module.scaling
        }

    def adapter_config(self, name: str) -> dict[str, Any]:
        """The adapter's `adapter_config.json`; of a head that stands alone, what there is to say of it."""
        if ADAPTER_PREFIX + name in self._peft.peft_config:
            config = self._peft.peft_config[ADAPTER_PREFIX + name].to_dict()
        else:
            config = {}
        config.update(
            base_model_name_or_path=self.base.name.partition("@")[0],
            revision=self.base.revision,
            inference_mode=True,
        )
        if name in self.heads:
            config.update(scalar.HEAD_CONFIG)
        return {
            key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
            for key, value in sorted(config.items())
        }

    def _share_active_list(self) -> None:
        for layer in self._layers():
            layer._active_adapter = self._active

    def _layers(self) -> list[Any]:
        return [module for module in self.base.model.modules() if isinstance(module, LoraLayer)]

    def _freeze_all_but_trainable(self) -> None:
        names = {ADAPTER_PREFIX + name for name in self.trainable}
        for key, parameter in self._all_parameters():
            parameter.requires_grad_(any(f".{name}." in key for name in names))
            assert not parameter.requires_grad or parameter.dtype == torch.float32, (
                f"the master of {key} is {parameter.dtype}"
            )
        for layer in self._layers():
            for name, dropout in layer.lora_dropout.items():
                if name not in names and isinstance(dropout, nn.Dropout):
                    dropout.p = 0.0  # a frozen adapter's dropout would still fire in train mode

    def _checkpoint(self, checkpointing: Checkpointing, offload: bool) -> None:
        active = self._active
        self._checkpointing = checkpoint_layers(
            self.base.model,
            checkpointing,
            offload,
            lambda: (nullcontext(), _ActiveAdapters(active, active)),
        )

    def unload_adapters(self) -> None:
        """Takes every adapter off the base, which is then as it was loaded: the next `Roles` can stand on it. These
        have no use after."""
        model = self.base.model
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        del model.peft_config
        if self._checkpointing:
            disable_checkpointing(model)
        model.train()
        self._peft = None
        self.heads.clear()


def _tensor_shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None


def _scatter(values: Tensor, rows: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=values.dtype, device=values.device).index_put((rows, columns), values)
