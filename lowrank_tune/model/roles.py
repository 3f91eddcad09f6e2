"""Roles: stacks of LoRA adapters over one frozen base, some with a scalar head. Only this module uses PEFT's model.

All tuner layers share one list of active adapters, and entering a role rewrites that list in place. This takes half a
microsecond and never changes `requires_grad` (PEFT's own functions change it, and then gradients are lost without an
error). An empty stack is the base, bit for bit. With gradient checkpointing the recomputation enters the stack of its
forward pass, whatever is active by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowrank_tune.batch import Batch
from lowrank_tune.errors import UserError, first_line
from lowrank_tune.events import Event, warning
from lowrank_tune.model import heads as scalar
from lowrank_tune.model.activation_checkpointing import Checkpointing, checkpoint_layers
from lowrank_tune.model.active_adapters import ActiveAdapters, Recomputation
from lowrank_tune.model.base import Base, num_stored_bytes
from lowrank_tune.model.chunked_mlp import chunk_mlps
from lowrank_tune.model.compiled_layers import CompiledLayers
from lowrank_tune.model.decoder import Decoder
from lowrank_tune.model.decoder_layers import restore_layers
from lowrank_tune.model.decoding_options import DecodingOptions
from lowrank_tune.model.fast_paths import (
    FastPath,
    disabled,
    fixed_values,
    gradients_of,
    made_up_rows,
    verify_fast_paths,
)
from lowrank_tune.model.frozen_adapters import FrozenAdapters
from lowrank_tune.model.logprobs import (
    Head,
    LogProbs,
    check_head,
    chunked_entropy,
    chunked_kl,
    chunked_logps,
    default_chunk_logits,
    head_of,
)
from lowrank_tune.model.lora_forward import LoraLinears, wider_stacks
from lowrank_tune.model.module_patterns import resolve_patterns
from lowrank_tune.model.oom import MemoryLimits, free_traceback, is_out_of_memory
from lowrank_tune.model.router_loss import RouterLoss

ADAPTER_PREFIX = "lt_"
"""PEFT loses weights of an adapter whose name is part of a module's name, so names get a prefix."""
TokenIndex = tuple[Tensor, ...]
"""Rows (N,) and columns (N,) of N tokens of a batch."""


class Roles:
    """Adapters over a base, and the roles: stacks of adapters that can be activated.

    `adapters` are from the lowest to the top, all fresh (a fresh adapter changes nothing, because its B is zero) until
    `load_adapter_tensors`. Only those in `trainable` get a gradient. `heads` are roles with a scalar head, which
    belongs to the adapter with the role's name, the top of its stack, and is trained and saved with it. If no adapter
    has that name, only the head is trained, on a stack that other roles train. `checkpointing` selects the layers that
    are recomputed in the backward pass, and `offload` keeps their inputs in host memory
    (`model/activation_checkpointing.py`). `mlp_chunks` is the number of chunks of the sequence in which each MLP is
    computed (`model/chunked_mlp.py`). `logits_chunk` logits exist at once (`default_chunk_logits`). With
    `torch_compile` the layers are compiled (`model/compiled_layers.py`).
    """

    decoder: Decoder
    logits_chunk: int

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
        mlp_chunks: int = 1,
        logits_chunk: int | None = None,
        torch_compile: bool = False,
    ) -> None:
        self.base = base
        self.stacks = {role: [ADAPTER_PREFIX + name for name in stack] for role, stack in stacks.items()}
        self.trainable = frozenset(trainable)
        self.heads = dict[str, scalar.ScalarHead]()
        self._frozen = FrozenAdapters(base.dtype)
        self.fast_paths = list[FastPath]()
        self._compiled: CompiledLayers | None = None
        self.verified = False
        self._undo = ExitStack()
        self.limits = MemoryLimits()
        self.decoding = DecodingOptions()
        self.router_loss: RouterLoss | None = None
        self._active: list[str] = []
        self._linears = LoraLinears(self._active)
        torch.manual_seed(seed)
        self._peft: Any = None
        for name, config in adapters.items():
            self._add_adapter(name, config)
        assert self._peft is not None, "roles without an adapter"
        # Logits are computed from the head's frozen weight, which is often the embedding's too.
        if isinstance(base.model.get_output_embeddings(), LoraLayer):
            self.unload_adapters()
            raise UserError(
                f"adapters: one of them changes the output head of {base.name}, which this kit keeps as it is",
            )
        self.head: Head = head_of(base.model)
        self.logits_chunk = logits_chunk or default_chunk_logits(len(self.head.weight), base.device)
        self.decoder = Decoder(base, self._plain_base, self._emit)
        for role in heads:
            is_trained_alone = role in self.trainable and role not in adapters
            assert is_trained_alone or self.stacks[role][-1:] == [ADAPTER_PREFIX + role], (
                "a head belongs to the top adapter of its own role, or is trained alone"
            )
            self.heads[role] = scalar.ScalarHead(self.head.weight.shape[1], base.device)
        self._share_active_list()
        self._freeze_all_but_trainable()
        self._checkpoint(checkpointing, offload)
        self._undo.callback(chunk_mlps(base.model, mlp_chunks, self._recompute_contexts))
        with self.activate("base"):
            check_head(base.model, self.head)
        self._add_fast_paths(torch_compile)

    @property
    def active_stack(self) -> list[str]:
        """The adapters that are active, lowest first, with PEFT's names."""
        return self._active[:]

    @property
    def lora_layers(self) -> list[Any]:
        """PEFT's layers over the modules that adapters change."""
        return [module for module in self.base.model.modules() if isinstance(module, LoraLayer)]

    def activate(self, role: str) -> AbstractContextManager[None]:
        """Returns a context in which a role is active: a name in `stacks`, or `base` for no adapter."""
        stack = [] if role == "base" else self.stacks[role]
        return ActiveAdapters(self._linears, stack)

    @contextmanager
    def _plain_base(self) -> Iterator[None]:
        with self.activate("base"), disabled(self.fast_paths):
            yield

    def inference_mode(self) -> AbstractContextManager[None]:
        """Returns a context with eval mode and without autograd."""
        return self.base.inference_mode()

    def plain_paths(self) -> AbstractContextManager[None]:
        """Returns a context without the fast paths."""
        return disabled(self.fast_paths)

    def _emit(self, event: Event) -> None:
        self.limits.emit(event)

    def resident_bytes(self) -> int:
        """Returns the bytes that stay on the device for the whole run: the base as stored, adapters and heads, and two
        moments of what is trained."""
        model = self.base.model
        stored = sum(map(num_stored_bytes, (*model.parameters(), *model.buffers())))
        heads = sum(head.weight.nbytes for head in self.heads.values())
        trained = sum(parameter.nbytes for _, parameter in self._all_parameters() if parameter.requires_grad)
        return stored + heads + 2 * trained

    def parameters(self, role: str) -> list[nn.Parameter]:
        """Returns the trainable parameters of a role, in the order of `named_parameters`."""
        return list(self.named_parameters(role).values())

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Returns the trainable parameters of a role by name, a scalar head last."""
        top = ADAPTER_PREFIX + role
        if role not in self.heads:
            top = self.stacks[role][-1]
        return {name: p for name, p in self._all_parameters() if p.requires_grad and f".{top}." in name}

    def _add_adapter(
        self,
        name: str,
        config: LoraConfig,
    ) -> None:
        try:
            config = resolve_patterns(config, self._module_names())
            if self._peft is None:
                self._peft = PeftModel(
                    self.base.model,
                    config,
                    adapter_name=ADAPTER_PREFIX + name,
                )
            else:
                self._peft.add_adapter(ADAPTER_PREFIX + name, config)
        # Only a loaded configuration can be wrong: fresh ones are made for this base.
        except (ValueError, TypeError, UserError) as error:
            reason = first_line(error)
            raise UserError(f"adapters.{name}: this adapter does not fit {self.base.name}: {reason}") from error

    def _module_names(self) -> list[str]:
        """Returns the names of the base's modules, without those that adapters added."""
        prefixes = tuple(
            f"{name}." for name, module in self.base.model.named_modules() if isinstance(module, LoraLayer)
        )
        return [name for name, _ in self.base.model.named_modules() if name and not name.startswith(prefixes)]

    def _all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._peft.named_parameters()
        for role, head in self.heads.items():
            yield f"score.{ADAPTER_PREFIX}{role}.weight", head.weight

    def _add_fast_paths(self, torch_compile: bool) -> None:
        model = self.base.model
        self.fast_paths.append(self.decoder.packed_rows)
        if self.base.backend == "transformers":
            trained = [ADAPTER_PREFIX + name for name in self.trainable]
            self._linears.wider = wider_stacks(self.stacks.values(), trained)
            self._linears.install(model)
            self._undo.callback(self._linears.remove)
            self.fast_paths.append(self._linears)
        if torch_compile:
            self._undo.callback(restore_layers, model)
            self._compiled = CompiledLayers(model, self._emit)
            self.decoder.layers_context = self._compiled.running
            self.decoder.packed_rows.compiled = self._compiled
            self.fast_paths.append(self._compiled)

    def hidden(
        self,
        role: str,
        batch: Batch,
    ) -> Tensor:
        """Returns the last hidden states (B, T, d)."""
        self.verify_fast_paths(role)
        recording = nullcontext() if self.router_loss is None else self.router_loss.recording(role, batch)
        with self.activate(role), recording:
            return self.decoder.hidden(batch)

    def add_router_loss(self, router_loss: RouterLoss) -> None:
        """Records the router's logits in training. Rows are padded then: in a packed row a token may belong to several
        rows."""
        self.router_loss = router_loss
        self.decoder.packed_rows.enabled = False
        self.decoder.share_prefixes = False

    def verify_fast_paths(self, role: str) -> None:
        """Compares the fast paths with the plain ones, once, before the first pass: on the roles that are trained, or
        else on this one."""
        if self.verified or not any(path.enabled for path in self.fast_paths):
            return
        self.verified = True
        try:
            with nullcontext() if self._compiled is None else self._compiled.one_report():
                self._compare_fast_paths(role)
                self._compile_all_stacks()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_traceback(error)
            self.disable_fast_paths("memory ran out while they were compared with the plain ones")

    def disable_fast_paths(self, reason: str) -> None:
        """Disables all fast paths, with a warning."""
        names = ", ".join(path.name for path in self.fast_paths if path.enabled)
        for path in self.fast_paths:
            path.enabled = False
        self._emit(warning(f"{names}: {reason}; the plain paths are used"))

    def _compare_fast_paths(self, role: str) -> None:
        # Of roles with one stack the first: a head that is trained alone has no part in log-probs.
        trained = {tuple(self.stacks[name]): name for name in reversed(self.stacks) if name in self.trainable}
        roles = list(trained.values()) or [role]
        parameters = {name: self.named_parameters(name) if trained else {} for name in roles}
        with fixed_values(chain.from_iterable(each.values() for each in parameters.values())):
            verify_fast_paths(
                self.fast_paths,
                partial(self._logps_and_gradients, parameters),
                self.base,
                self._emit,
            )

    def _compile_all_stacks(self) -> None:
        """Runs made-up rows through all stacks, with and without gradients. The sizes of the first rows decide how the
        compiler divides the work of a kernel: they must be the same in a run that is resumed. So must the random
        numbers of its next step: those that dropout draws here are not taken from them."""
        if self._compiled is None or not self._compiled.enabled:
            return
        rows = made_up_rows(self.head.weight.shape[0], self.base.device)
        devices = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for role in self.stacks:
                with self.inference_mode():
                    self.hidden(role, rows)
                if role in self.trainable:
                    with self.base.train_mode():
                        self.hidden(role, rows)

    def _logps_and_gradients(
        self,
        parameters: Mapping[str, Mapping[str, nn.Parameter]],
        batch: Batch,
    ) -> dict[str, Tensor]:
        """Returns the log-probs of each role, and the gradients of its parameters."""
        outputs: dict[str, Tensor] = {}
        for role, trained in parameters.items():
            logps = self.logps(role, batch).logps
            outputs |= gradients_of(logps.sum(), trained)
            outputs[role] = logps.detach()
        return outputs

    def logps(
        self,
        role: str,
        batch: Batch,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> LogProbs:
        """Returns log p(token t | tokens before t) and the entropy where `completion_mask`, else 0; (B, T) fp32. The
        shift by one happens here."""
        logps, entropy, _ = self.token_logps_and_entropy(
            role,
            batch,
            temperature,
            entropy_gradient,
        )
        return LogProbs(logps, entropy)

    def token_logps_and_entropy(
        self,
        role: str,
        batch: Batch,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log-probs and entropies as `logps`, and whether the token is the most likely one; (B, T) each.
        Entropies have a gradient only with `entropy_gradient`, which costs a second pass through the head."""
        tokens = batch.indices_of(_loss_mask)
        hidden = self._states_before(role, batch, tokens)
        logps, entropy, is_top = chunked_logps(
            self.head,
            hidden,
            batch.input_ids[tokens],
            temperature,
            self.logits_chunk,
        )
        if entropy_gradient:
            entropy = chunked_entropy(self.head, hidden, temperature, self.logits_chunk)
        shape = batch.input_ids.shape
        return _scatter(logps, tokens, shape), _scatter(entropy, tokens, shape), _scatter(is_top, tokens, shape)

    def full_vocab_kl(
        self,
        role: str,
        reference: str,
        batch: Batch,
        temperature: float = 1.0,
        gradient: bool = False,
    ) -> Tensor:
        """Returns KL(role || reference) over the whole vocabulary where `completion_mask`, else 0; (B, T) fp32, with a
        gradient for the role if `gradient`."""
        tokens = batch.indices_of(_loss_mask)
        with nullcontext() if gradient else self.inference_mode():
            hidden = self._states_before(role, batch, tokens)
        with self.inference_mode():
            reference_hidden = self._states_before(reference, batch, tokens)
        kl = chunked_kl(
            self.head,
            hidden,
            reference_hidden,
            temperature,
            self.logits_chunk,
        )
        return _scatter(kl, tokens, batch.input_ids.shape)

    def _states_before(
        self,
        role: str,
        batch: Batch,
        tokens: TokenIndex,
    ) -> Tensor:
        """Returns the hidden states (N, d) that predict the tokens at N places."""
        rows, columns = tokens
        return self.hidden(role, batch)[rows, columns - 1]

    def scores(
        self,
        role: str,
        batch: Batch,
    ) -> Tensor:
        """Returns the scalar head's value at every attended token, else 0; (B, T) fp32."""
        tokens = batch.indices_of(_attention_mask)
        values = self.heads[role](self.hidden(role, batch)[tokens])
        return _scatter(values, tokens, batch.input_ids.shape)

    def sequence_scores(
        self,
        role: str,
        batch: Batch,
    ) -> Tensor:
        """Returns the scalar head's value at the last attended token of each row, on whichever side padding is; (B,)
        fp32."""
        last = (batch.lengths - 1).clamp_min(0)
        rows = torch.arange(len(batch), device=last.device)
        return self.heads[role](self.hidden(role, batch)[rows, last])  # type: ignore[no-any-return]

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Returns the weights of the adapter and its head, with the names of PEFT's file format. Checks that all
        tensors are included."""
        peft_name = ADAPTER_PREFIX + name
        tensors = {}
        if peft_name in self._peft.peft_config:
            tensors = get_peft_model_state_dict(
                self._peft,
                adapter_name=peft_name,
                save_embedding_layers=False,
            )
            tensors |= self._frozen.adapter_tensors(peft_name)
        if name in self.heads:
            tensors[scalar.HEAD_WEIGHT_KEY] = self.heads[name].weight
        expected = sum(f".{peft_name}." in key for key, _ in self._all_parameters())
        assert len(tensors) == expected, f"adapter {name}: {len(tensors)} tensors to save, {expected} in the model"
        return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in sorted(tensors.items())}

    def load_adapter_tensors(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        where: str,
    ) -> None:
        """Loads weights into an adapter. Raises UserError if names or shapes do not fit this base; `where` begins the
        message."""
        expected = _shapes(self.adapter_tensors(name))
        given = _shapes(tensors)
        wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        if wrong:
            first = wrong[0]
            raise UserError(
                f"{where}: this adapter was made for another base than {self.base.name}: {len(wrong)} tensors "
                f"differ; {first} is {given.get(first)} there and {expected.get(first)} here",
            )
        if name in self.heads:
            with torch.no_grad():
                self.heads[name].weight.copy_(tensors[scalar.HEAD_WEIGHT_KEY])
        lora = {key: tensor for key, tensor in tensors.items() if key != scalar.HEAD_WEIGHT_KEY}
        if lora:
            for key, parameter in self._all_parameters():
                if f".{ADAPTER_PREFIX}{name}." in key:
                    self._frozen.restore(key, parameter)
            set_peft_model_state_dict(
                self._peft,
                lora,
                adapter_name=ADAPTER_PREFIX + name,
            )
            self._share_active_list()
            self._freeze_all_but_trainable()

    def scalings(self, name: str) -> dict[str, float]:
        """Returns the factor of an adapter's product B A for each module that it changes."""
        peft_name = ADAPTER_PREFIX + name
        return {
            module_name: float(module.scaling[peft_name])
            for module_name, module in self.base.model.named_modules()
            if isinstance(module, LoraLayer) and peft_name in module.scaling
        }

    def adapter_config(self, name: str) -> dict[str, Any]:
        """Returns the content of the adapter's `adapter_config.json`. A head that is trained alone has few keys."""
        config: dict[str, Any] = {}
        lora_config = self._peft.peft_config.get(ADAPTER_PREFIX + name)
        if lora_config is not None:
            config.update(lora_config.to_dict())
        config["base_model_name_or_path"] = self.base.name.partition("@")[0]
        config["revision"] = self.base.revision
        config["inference_mode"] = True
        if name in self.heads:
            config.update(scalar.HEAD_CONFIG)
        return {key: _to_json(value) for key, value in sorted(config.items())}

    def _share_active_list(self) -> None:
        for layer in self.lora_layers:
            layer._active_adapter = self._active

    def _freeze_all_but_trainable(self) -> None:
        names = {ADAPTER_PREFIX + name for name in self.trainable}
        for key, parameter in self._all_parameters():
            is_trained = any(f".{name}." in key for name in names)
            assert not is_trained or parameter.dtype == torch.float32, f"the master of {key} is {parameter.dtype}"
            parameter.requires_grad_(is_trained)
            if "lora_" in key and not is_trained:
                self._frozen.store(key, parameter)
        # The dropout of a frozen adapter would be applied in train mode.
        for layer in self.lora_layers:
            for name, dropout in layer.lora_dropout.items():
                if name not in names and isinstance(dropout, nn.Dropout):
                    dropout.p = 0.0

    def _checkpoint(
        self,
        checkpointing: Checkpointing,
        offload: bool,
    ) -> None:
        undo = checkpoint_layers(
            self.base.model,
            checkpointing,
            offload,
            self._recompute_contexts,
            keep_forwards=self.base.backend != "transformers",
        )
        self._undo.callback(undo)

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Returns the contexts of a forward pass, and of its recomputation with the adapters and the attention function
        that are active now."""
        return nullcontext(), Recomputation(self._linears, self.decoder.current_attention())

    def unload_adapters(self) -> None:
        """Removes all adapters from the base, which is then as it was loaded, for the next `Roles`. This object cannot
        be used afterwards."""
        model = self.base.model
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        del model.peft_config
        self._undo.close()
        model.train()
        self._peft = None
        self.heads.clear()


def _loss_mask(batch: Batch) -> Tensor:
    return batch.loss_mask


def _attention_mask(batch: Batch) -> Tensor:
    return batch.attention_mask


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _to_json(value: Any) -> Any:
    """Returns a set as a sorted list, and an enum's value."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def _scatter(
    values: Tensor,
    tokens: TokenIndex,
    shape: torch.Size,
) -> Tensor:
    """Returns a tensor of this shape with N values at N tokens, else 0."""
    return torch.zeros(
        shape,
        dtype=values.dtype,
        device=values.device,
    ).index_put(tokens, values)
