"""Runs that ended, made by hand in a second: a random base on disk, adapters with weights that matter, and the folder
that a stage leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from models import CPU, perturb, random_model
from transformers import AutoTokenizer

from lowrank_tune import Recipe
from lowrank_tune.checkpoint import write_atomically
from lowrank_tune.config import AdapterConfig, BaseConfig
from lowrank_tune.data import ChatTemplate
from lowrank_tune.model.adapters import lora_config
from lowrank_tune.model.base import base_hashes, combined_hash, hash_of, load_base, load_tokenizer
from lowrank_tune.model.base_source import BUILTIN_MODEL
from lowrank_tune.model.roles import Roles
from lowrank_tune.training.final_adapter import final_folder

IDS = torch.tensor([[5, 9, 33, 7, 21, 60, 3, 44, 120, 90, 7, 8]])
CARD_WORDS = ("measured", "held-out")


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, its base's folder, and what the run answered to `IDS` over its 4-bit base (T, V)."""

    run: Path
    base: Path
    logits: torch.Tensor


def make_base(folder: Path, kind: str, tied: bool, spare: int = 0, **changes: Any) -> Path:
    """Saves a random model with the tokenizer of the package's tiny base, which has no template; `spare` rows of the
    embedding belong to no token."""
    tokenizer = load_tokenizer(BaseConfig(model=BUILTIN_MODEL))
    shape = {
        "vocab_size": len(tokenizer) + spare,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    shape |= changes
    model = random_model(kind, gain=1.0, **shape)
    if tied:  # else its logits are so large that bf16 cannot hold them apart
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.4)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(
    place: Path,
    kind: str = "llama",
    tied: bool = False,
    lower: tuple[str, ...] = (),
    rslora: bool = False,
    bits: int = 4,
    stack: str = "combined",
    spare: int = 0,
    **more: Any,
) -> FinishedRun:
    """Returns a finished run of `kind` whose policy is trained over the adapters `lower`."""
    base_folder = make_base(place / "base", kind, tied, spare)
    recipe = Recipe.from_dict(
        {
            "name": "tried",
            "algorithm": "sft",
            "base": {"model": str(base_folder), "bits": bits},
            "train": {"max_steps": 1, "final_adapters": stack},
            "adapters": {
                **{name: {"path": f"/home/somebody/runs/{name}/final"} for name in lower},
                "policy": {"r": 4, "use_rslora": rslora},
            },
            "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 12}], "eval_fraction": 0.25},
        }
    )
    template = ChatTemplate.from_tokenizer(load_tokenizer(recipe.base))
    base = load_base(recipe.base, template.tokenizer, CPU)
    names, hashes = [*lower, "policy"], base_hashes(base.model)
    wanted = AdapterConfig(r=4, lora_alpha=8.0, use_rslora=rslora, **more)
    roles = Roles(
        base,
        {name: lora_config(wanted, base.model) for name in names},
        ["policy"],
        {"policy": names, "reference": list(lower)},
    )
    for seed, name in enumerate(names):
        perturb(roles, name, seed=seed + 1, size=0.09)
    with roles.inference_mode(), roles.activate("policy"):
        logits = base.model(input_ids=IDS).logits[0].clone()
    contents = {
        name: combined_hash({key: hash_of(tensor) for key, tensor in roles.adapter_tensors(name).items()})
        for name in lower
    }
    built = SimpleNamespace(
        roles=roles, trained=("policy",), template=template, base=base, stop_ids=base.end_ids | template.end_ids
    )
    summary = {
        "step": 1,
        "best": {"step": 1, "loss": 0.5},
        "heldout_details": {"base": {"accuracy": 0.25}, "sft": {"accuracy": 0.75}},
    }
    stage: Any = SimpleNamespace(
        recipe=recipe, built=built, summary=summary, frozen_adapters=contents, emit=lambda event: None
    )
    run = place / "run"
    write_atomically(run / "final", final_folder(stage))
    (run / "run.json").write_text(json.dumps({"version": 2, "recipe": recipe.to_dict()}))
    (run / "base.json").write_text(
        json.dumps({"model": base.name, "revision": None, "bits": bits, "device": "cpu", "tensors": hashes})
    )
    return FinishedRun(run, base_folder, logits)


def kl(trained: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(trained || other) in nats a token, of logits (T, V), in double precision."""
    p, q = trained.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def reloaded_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)
