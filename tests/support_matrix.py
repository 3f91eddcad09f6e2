"""Model families, each tiny and random, and what the kit does with them.

`model/test_support_matrix.py` runs the checks, and `scripts/models_page.py` writes the table of docs/models.md.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from models import (
    CPU,
    gradients,
    make_batch,
    perturb,
    relative_error,
    roles_over,
    sft_over,
    with_token_weights,
    zero_grad,
)
from peft import PeftModel
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import lowrank_tune
from lowrank_tune.assembly.finished_run import adapters_in, load_finished_run
from lowrank_tune.assembly.finished_run import roles_of as finished_roles
from lowrank_tune.config import BaseConfig, load_any
from lowrank_tune.export.export import ExportOptions, export
from lowrank_tune.export.merge import merge
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.base import Base, load_base, load_tokenizer, nf4_config
from lowrank_tune.model.roles import Roles

TINY_BASE = Path(lowrank_tune.__file__).parent / "toy" / "base"
VOCAB = 915
TOLERANCE = 1e-4
"""Of log-probs in fp32, which tiny random models amplify."""
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


GGUF = "GGUF adapter"
NOT_IN_LLAMA_CPP = {GGUF: "llama.cpp does not support this family"}
GEMMA_4_GGUF = {
    GGUF: "llama.cpp computes `per_layer_model_projection` without adapters; a Gemma 4 without inputs per layer, or an "
    "adapter without that module, is exported"
}
QWEN_3_5_GGUF = {
    GGUF: "with more value heads than key heads in the linear attention, llama.cpp stores the columns of `out_proj` in "
    "another order, which its own converter of adapters refuses; with as many of each the adapter is exported"
}
EXPERTS_NOTE = "the experts stay in 16 bits, and have no adapters"
RECURRENT_NOTE = "rows are padded, and shared beginnings are computed for each row"


@dataclass(frozen=True)
class Family:
    """A row of the page: model type, changes of the configuration, and the checks that raise UserError, each with its
    reason. `checkpoint` is the model type of a multimodal checkpoint that contains it."""

    title: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


LLAMA_LIKE = (
    Family("Llama 3.x", "llama"),
    Family("Mistral", "mistral", {"sliding_window": 32}),
    Family("Ministral", "ministral", WINDOW, refused=NOT_IN_LLAMA_CPP),
    Family("Ministral 3", "ministral3", checkpoint="mistral3"),
    Family("Qwen2.5", "qwen2"),
    Family("Qwen3, Qwen3-2507", "qwen3"),
    Family("SmolLM3", "smollm3", {"num_hidden_layers": 4}),
    Family("Granite 3", "granite"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", WINDOW),
    Family("GLM-4", "glm4"),
    Family("EXAONE 4", "exaone4"),
    Family("Phi-4-mini, Phi-3", "phi3"),
)
GEMMA = (
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 32}),
    Family("Gemma 3", "gemma3_text", WINDOW | {"query_pre_attn_scalar": 16}, "gemma3"),
    Family(
        "Gemma 4, text",
        "gemma4_text",
        WINDOW | {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16, "tie_word_embeddings": True},
        "gemma4",
        GEMMA_4_GGUF,
    ),
)
MIXTURES = (
    Family("Qwen3-MoE", "qwen3_moe", EXPERTS, note=EXPERTS_NOTE),
    Family("Mixtral", "mixtral", {"num_local_experts": 2, "num_experts_per_tok": 2}, note=EXPERTS_NOTE),
    Family(
        "gpt-oss",
        "gpt_oss",
        WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 4, "intermediate_size": 64},
        note=EXPERTS_NOTE,
    ),
)
HYBRID = (
    Family("Qwen3.5, text", "qwen3_5_text", LINEAR_ATTENTION, "qwen3_5", QWEN_3_5_GGUF, RECURRENT_NOTE),
    Family(
        "Granite 4",
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
        note=RECURRENT_NOTE,
    ),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}, note=RECURRENT_NOTE),
)
OTHERS = (
    Family("Cohere", "cohere", {"logit_scale": 0.25}),
    Family("Phi", "phi"),
    Family("StableLM", "stablelm"),
    Family("StarCoder 2", "starcoder2"),
    Family("GPT-NeoX", "gpt_neox"),
    Family("OPT", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}, refused=NOT_IN_LLAMA_CPP),
)
FAMILIES = (*LLAMA_LIKE, *GEMMA, *MIXTURES, *HYBRID, *OTHERS)
ALGORITHMS = ("sft", "reward", "dpo", "kto", "grpo", "ppo")
IDS = torch.arange(3, 43).view(2, 20) * 7 % VOCAB
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [40, 41]]
LENGTHS = (12, 5, 24, 9)
NEAR_TIE = 1e-4
"""A gap between the best two logits that rounding can close."""


def is_in_transformers(family: Family) -> bool:
    """Returns whether the installed transformers has the family."""
    return family.model_type in CONFIG_MAPPING and (not family.checkpoint or family.checkpoint in CONFIG_MAPPING)


def random_weights(model: Any) -> Any:
    """Fills matrices, so that distributions are far from uniform, and shifts vectors, so that a missing one is
    found."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


class Case:
    """A family's tiny checkpoint on disk, and runs over it. A check raises AssertionError if it fails, and UserError
    with the reason if the kit refuses."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.place = tempfile.TemporaryDirectory(prefix="lt-family-")
        self.root = Path(self.place.name)

    @cached_property
    def folder(self) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.family.model_type, **copy.deepcopy(CONFIG | dict(self.family.changes)))
        model = random_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        folder = self.root / "base"
        # As published weights are; a merged model has bf16 too.
        model.to(torch.bfloat16).save_pretrained(folder)
        for file in TINY_BASE.iterdir():
            if file.name.startswith("tokenizer") or file.suffix == ".jinja":
                shutil.copy(file, folder)
        return folder

    def base(self) -> Base:
        base_config = BaseConfig(model=str(self.folder), bits=4)
        return load_base(base_config, load_tokenizer(base_config), CPU)

    def roles(self) -> Roles:
        roles = roles_over(self.base())
        perturb(roles, "policy", size=0.05)
        return roles

    def run(self, algorithm: str) -> Path:
        """Returns the folder of a run of one step."""
        changes = [f"base.model={self.folder}", "train.max_steps=1", "train.micro_batch_size=4", "evaluate={}"]
        changes += ["data.train.0.max_samples=16"]
        if algorithm in ("grpo", "ppo"):
            changes += ["train.prompts_per_step=2", "rollout.num_generations=4", "rollout.max_new_tokens=8"]
        else:
            changes += ["train.global_batch_size=4"]
        if algorithm == "grpo":
            changes += ["grpo.zero_std_groups=keep"]
        out = self.root / algorithm
        lowrank_tune.run(load_any(f"tiny-{algorithm}", *changes), out=out, ui="none", device=CPU)
        return out

    @cached_property
    def sft_run(self) -> Path:
        return self.run("sft")


def check_4_bits(case: Case) -> None:
    """Every linear module except the head has packed weights."""
    model = case.base().model
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            assert getattr(module.weight, "quant_state", None) is not None, f"{name} is not in 4 bits"


def check_adapters_off(case: Case) -> None:
    """The reference computes the bits of the base without adapters."""
    base = case.base()
    with base.inference_mode():
        expected = base.model(input_ids=IDS).logits
    roles = roles_over(base)
    perturb(roles, "policy")
    with roles.inference_mode(), roles.activate("reference"):
        assert torch.equal(base.model(input_ids=IDS).logits, expected)
    with roles.inference_mode(), roles.activate("policy"):
        assert not torch.equal(base.model(input_ids=IDS).logits, expected)


def check_rows(case: Case) -> None:
    """Log-probs of a row are those that it has alone, and a step has one gradient at any micro-batch size."""
    roles = case.roles()
    stream = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCAB, (length,), generator=stream).tolist() for length in LENGTHS]
    with roles.inference_mode():
        together = roles.logps("policy", make_batch(rows)).logps
        for index, row in enumerate(rows):
            alone = roles.logps("policy", make_batch([row])).logps[0, 1:]
            assert (together[index, 1 : len(row)] - alone).abs().max() < TOLERANCE
    algorithm = sft_over(roles)
    found = []
    for size in (len(rows), 1):
        zero_grad(roles)
        for part in with_token_weights(algorithm, make_batch(rows)).split(size):
            for term in algorithm.compute_losses(part):
                term.loss.backward()
        found.append(gradients(roles))
    assert relative_error(*found) < 1e-4


def check_rollout(case: Case) -> None:
    """Greedy completions are those of `generate`, and sampled log-probs those of the policy."""
    roles = case.roles()
    greedy = SamplingParams(12, frozenset(), 0.0)
    found = {one.prompt: one for one in Engine(roles, "policy").generate(PROMPTS, 1, greedy)}
    for index, prompt in enumerate(PROMPTS):
        expected, gaps = _generate(roles, prompt, 12)
        for position, (token, other) in enumerate(zip(found[index].token_ids, expected, strict=True)):
            if token != other:
                assert gaps[position] < NEAR_TIE, f"token {position} of prompt {index} is not that of `generate`"
                break
    for one in Engine(roles, "policy").generate(PROMPTS, 2, SamplingParams(12, frozenset(), 1.0)):
        prompt = PROMPTS[one.prompt]
        with roles.inference_mode():
            logps = roles.logps("policy", make_batch([[*prompt, *one.token_ids]])).logps[0]
        assert (logps[len(prompt) :] - torch.tensor(one.logps)).abs().max() < TOLERANCE


def _generate(roles: Roles, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Returns the greedy tokens of transformers, and the gap between the best two logits of each."""
    ids = torch.tensor([prompt])
    with roles.inference_mode(), roles.activate("policy"):
        output = roles.base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            use_cache=True,
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(output.logits)[:, 0].topk(2, dim=-1).values
    return output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def check_merge(case: Case) -> None:
    """The merged model answers as the trained one: the comparison of `merge`."""
    merge(case.sft_run, case.root / "merged", "dequantized", lambda event: None, lambda report: None, CPU)


def check_peft(case: Case) -> None:
    """PEFT over transformers' own class computes the log-probs of the run's adapter."""
    roles = finished_roles(adapters_in(load_finished_run(case.sft_run)), case.base())
    plain = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32, quantization_config=nf4_config(CPU))
    for module in plain.modules():
        # On some CPUs it repacks the weights in eval mode, and refuses small ones.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    with roles.inference_mode(), roles.activate("policy"):
        expected = roles.base.model(input_ids=IDS).logits
    # PEFT warns of adapter weights that are missing.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        tuned = PeftModel.from_pretrained(plain.eval(), str(case.sft_run / "final"))
        assert relative_error(tuned(input_ids=IDS).logits, expected) < 1e-4


def check_gguf(case: Case) -> None:
    """llama.cpp has names for every module of the adapter."""
    export(case.sft_run, ExportOptions(to="gguf-lora", out=case.root / "gguf"), lambda event: None, device=CPU)


def check_algorithm(algorithm: str, case: Case) -> None:
    """One step ends, and leaves an adapter."""
    out = case.sft_run if algorithm == "sft" else case.run(algorithm)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["step"] == 1 and (out / "final" / "adapter_model.safetensors").exists()


CHECKS: dict[str, Callable[[Case], None]] = {
    "4 bits": check_4_bits,
    **{algorithm: partial(check_algorithm, algorithm) for algorithm in ALGORITHMS},
    "rollout": check_rollout,
    "adapters off": check_adapters_off,
    "rows": check_rows,
    "merge": check_merge,
    "PEFT": check_peft,
    GGUF: check_gguf,
}
