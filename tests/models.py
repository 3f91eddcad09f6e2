"""Tiny random models. They are built here, saved, and loaded with `load_base`, so that their NF4 is that of a run."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.sft import SFT
from lowrank_tune.batch import Batch
from lowrank_tune.config import AdapterConfig, BaseConfig
from lowrank_tune.model.activation_checkpointing import Checkpointing
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import Base, freeze_base, load_base
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
# With tiny matrices more threads only wait for each other.
torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 97
TOKENIZER = SimpleNamespace(eos_token_id=1)
_TEMPORARY_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []

SMALL_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3_text": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}
LONGROPE_LENGTH = 16
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": LONGROPE_LENGTH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [3.0 + i for i in range(8)],
    },
}
"""A base like Phi-3-128k: RoPE type `longrope`, short up to 16 tokens."""
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
"""RoPE type `dynamic`, for rows of up to 32 tokens."""
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "cohere",
    "granite",
    "phi",
    "gpt_neox",
    "olmo2",
    "smollm3",
)


def random_model(kind: str = "llama", seed: int = 0, gain: float = 4.0, **changes: Any) -> Any:
    """Returns a random causal model. Its head is `gain` times as large as usual, so that its distributions are far from
    uniform."""
    options = SMALL_CONFIG | CONFIG_CHANGES.get(kind, {}) | changes
    if kind == "gpt2":
        options = {
            key: value
            for key, value in options.items()
            if key.startswith("n_") or key in ("vocab_size", *changes) or "token_id" in key
        }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **copy.deepcopy(options))  # some configurations complete a mapping in place
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases too, because a test must find a missing one.
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name or "embed_out" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.15)
        head = model.get_output_embeddings()
        if not config.get_text_config().tie_word_embeddings:
            head.weight.mul_(gain / 3)
    return model.eval()


@functools.cache
def saved_model(kind: str = "llama", seed: int = 0) -> str:
    """Returns the folder of a saved random model, which exists until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="lt-model-")
    _TEMPORARY_FOLDERS.append(folder)
    random_model(kind, seed).save_pretrained(folder.name)
    return folder.name


def load_base_of(bits: int = 4, kind: str = "llama", seed: int = 0) -> Base:
    """Returns a fresh base, loaded as in a run."""
    return load_base(BaseConfig(model=saved_model(kind, seed), bits=bits), TOKENIZER, CPU)  # type: ignore[arg-type]


def unquantized_base(kind: str, rope_factors: RopeFactors = "short", **changes: Any) -> Base:
    """Returns an unquantized base without saving it."""
    return freeze_base(random_model(kind, **changes), TOKENIZER, name=kind, bits=16, rope_factors=rope_factors)


def roles_over(
    base: Base,
    lower: Sequence[str] = (),
    dropout: float = 0.0,
    checkpointing: Checkpointing = False,
    seed: int = 0,
    trainable: Sequence[str] = ("policy",),
    stacks: Mapping[str, list[str]] | None = None,
    extra: Sequence[str] = (),
    heads: Sequence[str] = (),
    only: str = "policy",
    offload: bool = False,
    mlp_chunks: int = 1,
    torch_compile: bool = False,
    **lora: Any,
) -> Roles:
    """Returns roles with `policy`, or `only`, on top of `lower`; `extra` are more adapters, `heads` the roles with a
    scalar head."""
    adapter_settings = AdapterConfig(**{"r": 4, "lora_alpha": 16.0, "lora_dropout": dropout} | lora)
    names = (*lower, only, *extra)
    # The layers of GPT-2 are Conv1D, which the settings do not name.
    if base.model.config.model_type == "gpt2":
        configs = {
            name: LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
            for name in names
        }
    else:
        configs = {name: lora_config(adapter_settings, base.model) for name in names}
    stacks = stacks or {only: [*lower, only], "reference": list(lower)}
    roles = Roles(
        base,
        configs,
        trainable=trainable,
        stacks=stacks,
        checkpointing=checkpointing,
        seed=seed,
        heads=heads,
        offload=offload,
        mlp_chunks=mlp_chunks,
        torch_compile=torch_compile,
    )
    # Compared once, by forward passes that the tests must not count. Fast paths are not compared, and enabled.
    _ = roles.decoder.runs_without_masks
    roles.verified = True
    return roles


def llama_roles(bits: int = 4, **more: Any) -> Roles:
    return roles_over(load_base_of(bits), **more)


def use_plain_paths(roles: Roles) -> None:
    """Disables all fast paths."""
    for path in roles.fast_paths:
        path.enabled = False


def perturb(roles: Roles, *names: str, seed: int = 1, size: float = 0.1) -> None:
    """Gives adapters and their heads random weights. A fresh B and a fresh head are zero and change nothing."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for key, parameter in roles.base.model.named_parameters():
                if f".lt_{name}." in key:
                    parameter.copy_(size * torch.randn(parameter.shape, generator=stream))
            if name in roles.heads:
                roles.heads[name].weight.copy_(torch.randn(roles.heads[name].weight.shape, generator=stream))


def make_batch(
    rows: Sequence[Sequence[int]],
    completion_mask: Sequence[Sequence[bool]] | None = None,
    pad: int = 0,
    left: bool = False,
    more: int = 0,
    filler: int | None = None,
) -> Batch:
    """Returns rows padded to their longest plus `more`; padding contains `filler`."""
    width = max(map(len, rows)) + more
    ids = torch.full((len(rows), width), pad if filler is None else filler)
    attended, mask = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(list(row), dtype=torch.long)
        attended[i, where] = True
        mask[i, where] = True if completion_mask is None else torch.tensor(list(completion_mask[i]), dtype=torch.bool)
    return Batch(ids, attended, mask)


def ragged_batch(
    lengths: Sequence[int] = (9, 3, 12, 1, 7, 5, 2, 11),
    seed: int = 0,
    unscored: Sequence[int] = (4,),
    vocab: int = VOCAB,
) -> Batch:
    """Returns rows of these lengths, about two tokens in three scored, none in the rows `unscored`."""
    stream = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, vocab, (length,), generator=stream).tolist() for length in lengths]
    draws = [(torch.rand(length, generator=stream) < 0.67).tolist() for length in lengths]
    masks = [[False] * len(draw) if i in unscored else draw for i, draw in enumerate(draws)]
    return make_batch(rows, masks)


def sft_over(roles: Roles, batch: Batch | None = None) -> SFT:
    return SFT(AlgorithmContext(roles, lambda step: batch if batch is not None else ragged_batch(seed=step)))


def with_token_weights(algorithm: SFT, batch: Batch) -> Batch:
    batch.token_weights = algorithm.token_weights(batch)
    return batch


def gradients(roles: Roles, role: str = "policy") -> Tensor:
    """Returns all gradients of a role as one vector; a missing one is NaN, so that it equals nothing."""
    return torch.cat(
        [(torch.full_like(p, torch.nan) if p.grad is None else p.grad).flatten() for p in roles.parameters(role)]
    )


def reward_roles(base: Base, lower: Sequence[str] = (), **more: Any) -> Roles:
    """Returns roles with a `reward` adapter and its head on top of `lower`."""
    stacks = {"reward": [*lower, "reward"], "reference": list(lower)}
    return roles_over(base, lower=lower, only="reward", trainable=["reward"], stacks=stacks, heads=["reward"], **more)


def zero_grad(roles: Roles) -> None:
    for parameter in (*roles.base.model.parameters(), *(head.weight for head in roles.heads.values())):
        parameter.grad = None


def relative_error(a: Tensor, b: Tensor) -> float:
    """Returns the relative distance; infinite if a tensor is not finite or the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    distance = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
    return distance if distance == distance else float("inf")


def all_tensors(model: Any) -> dict[str, Tensor]:
    """Returns a copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def changed_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Returns the names whose bytes differ, or that only one of the two has."""
    both = before.keys() & after.keys()
    return set(before.keys() ^ after.keys()) | {n for n in both if not same_bytes(before[n], after[n])}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)))


@contextmanager
def count_forwards(roles: Roles) -> Iterator[list[int]]:
    """Counts how often the attention of the first layer runs, recomputations too. (Hooks of the layer itself are
    outside the checkpoint in some versions of transformers; those of a module within the layer always run.)"""
    count = [0]

    def one_more(*_: Any) -> None:
        count[0] += 1

    inside = next(
        m
        for name, m in roles.base.model.named_modules()
        if name.endswith(("layers.0.self_attn", "layers.0.attention", "h.0.attn"))
    )
    handle = inside.register_forward_hook(one_more)
    try:
        yield count
    finally:
        handle.remove()


def write_files(folder: Path, files: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
