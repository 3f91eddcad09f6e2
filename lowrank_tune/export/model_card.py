"""Model cards: what a folder holds, how it was made, what was measured, and how it is used elsewhere. No path but those
that the user named.

vLLM takes ranks up to 16 unless told otherwise, and only the limits of `VLLM_RANK_LIMITS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowrank_tune import __version__
from lowrank_tune.config import BaseConfig, RecipeConfig
from lowrank_tune.export.ollama import quoted
from lowrank_tune.model.base import BUILTIN_MODEL
from lowrank_tune.model.rotary import FixedRope

VLLM_RANK_LIMITS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""
DEFAULT_RANK_LIMIT = 16
"""Its default."""


@dataclass(frozen=True)
class Adapters:
    """What lies in `final/`: the stack's names, lowest first, whether the root is all of them in one, the root's
    `adapter_config.json`, and whether it writes text (a reward model does not)."""

    names: Sequence[str]
    combined: bool
    config: Mapping[str, Any]
    is_generative: bool


def model_card(
    recipe: RecipeConfig,
    summary: Mapping[str, Any],
    revision: str | None,
    adapters: Adapters,
    eos_tokens: Sequence[str],
    rope: FixedRope | None = None,
) -> str:
    """`README.md` of `final/`."""
    base = recipe.base.model.partition("@")[0]
    tags = ["lora", "qlora", "lowrank-tune", recipe.algorithm]
    parts = [
        yaml_front_matter(recipe, "peft", tags),
        f"# {recipe.name or recipe.algorithm}",
        "",
        _description(recipe, base, revision, adapters),
        "",
        *_training_section(recipe, summary),
        *results_section(summary),
        "## How to use it",
        "",
        *rope_section(rope),
    ]
    parts += (
        _policy_usage(recipe.base, adapters, eos_tokens)
        if adapters.is_generative
        else _reward_usage(recipe.base, revision)
    )
    parts += [
        "## The recipe",
        "",
        "```yaml",
        recipe_text(recipe),
        "```",
        "",
        f"Made with lowrank_tune {__version__}.",
        "",
    ]
    return "\n".join(parts)


def yaml_front_matter(recipe: RecipeConfig, library: str, tags: Sequence[str], relation: str = "adapter") -> str:
    """The part of a card that the hub reads. Names of files and folders have no place in it."""
    base = recipe.base.model.partition("@")[0]
    facts: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    if looks_like_hub_id(base):
        facts |= {"base_model": base, "base_model_relation": relation}
    sets = [source.dataset.partition("@")[0] for source in recipe.data.train]
    if any(map(looks_like_hub_id, sets)):
        facts["datasets"] = list(dict.fromkeys(filter(looks_like_hub_id, sets)))
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def rope_section(rope: FixedRope | None) -> list[str]:
    """With which rotary frequencies to serve it, where other software selects them by the length of its context."""
    if rope is None:
        return []
    length = rope.original_length
    if rope.factors is None:
        context = f"at most {length:,} tokens"
        other = "longer rows change the frequencies of RoPE type `dynamic`"
    elif rope.factors == "long":
        context = f"more than {length:,} tokens"
        other = "a shorter one selects the short factors"
    else:
        context = f"at most {length:,} tokens"
        other = "a longer one selects the long factors"
    flags = "vLLM's `--max-model-len`, llama.cpp's `-c`"
    return [f"It was trained with the {rope.name}: serve it with a context of {context} ({flags}); {other}.", ""]


def looks_like_hub_id(name: str) -> bool:
    """Whether a name reads like one of the hub's: owner/name, and no such file or folder here."""
    owner, _, rest = name.partition("/")
    return bool(owner and rest) and "/" not in rest and not name.startswith((".", "~")) and not Path(name).exists()


def _description(recipe: RecipeConfig, base: str, revision: str | None, adapters: Adapters) -> str:
    kind = {
        "sft": "answers",
        "reward": "preference pairs, as a reward model",
        "dpo": "preference pairs (DPO)",
        "ppo": "rewards (PPO)",
        "grpo": "rewards (GRPO)",
    }[recipe.algorithm]
    at = f" at revision `{revision}`" if revision else ""
    if recipe.base.bits == 4:
        quantized = "whose weights were frozen in 4 bits (NF4)"
    else:
        quantized = "whose weights were frozen"
    summary = f"A LoRA adapter for `{base}`{at}, {quantized}, trained on {kind}."
    if base == BUILTIN_MODEL:
        summary += (
            " (That base ships with lowrank_tune; `./base` below is a copy of its folder `lowrank_tune/toy/base`.)"
        )
    if len(adapters.names) > 1:
        stack = ", ".join(f"`{name}`" for name in adapters.names)
        summary += (
            (
                f" The adapters {stack} are folded into this one, exactly: its rank is the sum of theirs; "
                f"`{adapters.names[-1]}` alone lies in the folder of that name."
            )
            if adapters.combined
            else (
                f" It lies on top of {stack.rpartition(', ')[0]}, each in a folder of its name, and means nothing "
                f"without them."
            )
        )
    config = adapters.config
    targets = config["target_modules"]
    where = ", ".join(targets if isinstance(targets, list) and len(targets) <= 12 else [f"{len(targets)} modules"])
    return f"{summary}\n\nRank {config['r']}, alpha {config['lora_alpha']:g}, on {where}."


def _training_section(recipe: RecipeConfig, summary: Mapping[str, Any]) -> list[str]:
    lines = ["## Data", ""]
    for source in recipe.data.train:
        facts = [
            source.config_name,
            f"split {source.split}",
            source.format if source.format != "auto" else None,
            f"{source.max_samples:,} rows" if source.max_samples else None,
            f"weight {source.weight:g}" if source.weight else None,
        ]
        lines.append(f"- `{source.dataset}` ({', '.join(filter(None, facts))})")
    if recipe.rewards:
        lines += [
            "",
            "Rewarded by "
            + ", ".join(f"`{reward.name}` (weight {reward.weight:g})" for reward in recipe.rewards)
            + ".",
        ]
    best = summary.get("best", {}).get("step")
    if best is not None and recipe.train.load_best_model_at_end:
        best_note = f"; the adapter is that of step {best}"
    else:
        best_note = ""
    rate = f"learning rate {recipe.train.learning_rate:g}, {recipe.train.optim}, seed {recipe.seed}"
    return [*lines, "", f"Trained by `{recipe.algorithm}` for {summary.get('step')} steps; {rate}{best_note}.", ""]


def results_section(summary: Mapping[str, Any]) -> list[str]:
    """What the run measured, as tables."""
    lines = ["## Measured", ""]
    heldout = summary.get("heldout_details", {})
    if heldout:
        keys = list(dict.fromkeys(key for stats in heldout.values() for key in stats))
        lines += [f"| held-out questions | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
        lines += [
            f"| {name} | {' | '.join(_format_number(stats.get(key)) for key in keys)} |"
            for name, stats in heldout.items()
        ]
        lines.append("")
    figures = {f"best step, {key}": value for key, value in summary.get("best", {}).items() if key != "step"}
    figures |= {f"held-out pairs, {key}": value for key, value in summary.get("heldout_pairs", {}).items()}
    figures = figures or {
        f"last step, {key}": value for key, value in summary.get("last", {}).items() if key in ("loss", "reward", "kl")
    }
    if figures:
        lines += ["| | |", "|---|---|", *(f"| {key} | {_format_number(value)} |" for key, value in figures.items()), ""]
    return lines if len(lines) > 2 else []


def _format_number(value: object) -> str:
    if isinstance(value, (int, float)):
        return f"{value:.4g}"
    if value is None:
        return ""
    return str(value)


def rank_limit(rank: int) -> int | None:
    """The least `--max-lora-rank` of vLLM that takes this rank; None where none does."""
    return next((limit for limit in VLLM_RANK_LIMITS if limit >= rank), None)


def _vllm(base: str, rank: int) -> list[str]:
    limit = rank_limit(rank)
    if limit is None:
        return [
            f"**vLLM**: rank {rank} is above the highest that it takes ({VLLM_RANK_LIMITS[-1]}); "
            "`lowrank-tune merge` makes a model that it serves.",
            "",
        ]
    flag = f" --max-lora-rank {limit}" if rank > DEFAULT_RANK_LIMIT else ""
    if flag:
        why = f" Its default `max_lora_rank` of {DEFAULT_RANK_LIMIT} is too low for rank {rank} and must be raised:"
    else:
        why = ""
    return [
        f"**vLLM**, with this folder as `./adapter`.{why}",
        "",
        "```sh",
        f"vllm serve {base} --enable-lora{flag} --lora-modules tuned=./adapter",
        "```",
        "",
    ]


def _base_location(base: BaseConfig) -> str:
    """What other software knows the base by."""
    name = base.model.partition("@")[0]
    return "./base" if name == BUILTIN_MODEL else name


def _policy_usage(base: BaseConfig, adapters: Adapters, eos_tokens: Sequence[str]) -> list[str]:
    stops = ", ".join(f"`{end}`" for end in eos_tokens)
    lines = [
        f"An answer ends at {stops}; `generation_config.json` says so too. The chat template lies with the tokenizer.",
        "",
        "**PEFT**, with this folder as `./adapter`:",
        "",
        "```python",
        *_peft_snippet(base, adapters),
        "```",
        "",
    ]
    if len(adapters.names) > 1 and not adapters.combined:
        return [
            *lines,
            "vLLM, llama.cpp and Ollama take one adapter at a time, and these are several: run the recipe with "
            "`train.final_adapters: combined`, merge them into the base with `lowrank-tune merge`, or fold them into a "
            "GGUF adapter with "
            "`lowrank-tune export RUN --to gguf-lora`.",
            "",
        ]
    return [*lines, *_vllm(_base_location(base), int(adapters.config["r"])), *_llama_cpp(eos_tokens)]


def _peft_snippet(base: BaseConfig, adapters: Adapters) -> list[str]:
    four = base.bits == 4
    names = ", ".join(
        ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if four else []), "GenerationConfig"]
    )
    lines = ["import torch", "from peft import PeftModel", f"from transformers import {names}", ""]
    if four:
        lines += [
            'four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            "bnb_4bit_use_double_quant=True,",
            "                               bnb_4bit_compute_dtype=torch.bfloat16)  # as it was trained",
        ]
    _, _, revision = base.model.partition("@")
    given = ([f"revision={json.dumps(revision)}"] if revision else []) + (
        ["quantization_config=four_bits"] if four else []
    )
    arguments = ", ".join([json.dumps(_base_location(base)), "dtype=torch.bfloat16", 'device_map="auto"', *given])
    lines.append(f"base = AutoModelForCausalLM.from_pretrained({arguments})")
    if len(adapters.names) > 1 and not adapters.combined:
        first, *others = adapters.names
        folders = {name: f"./adapter/{name}" for name in adapters.names[:-1]} | {adapters.names[-1]: "./adapter"}
        lines.append(f'model = PeftModel.from_pretrained(base, "{folders[first]}", adapter_name="below_{first}")')
        lines += [f'model.load_adapter("{folders[name]}", adapter_name="below_{name}")' for name in others]
        lines.append(f"model.base_model.set_adapter({json.dumps([f'below_{name}' for name in adapters.names])})")
    else:
        lines.append('model = PeftModel.from_pretrained(base, "./adapter")')
    return [
        *lines,
        'tokenizer = AutoTokenizer.from_pretrained("./adapter")',
        "",
        'chat = [{"role": "user", "content": "..."}]',
        'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True).to(model.device)",
        'ends = GenerationConfig.from_pretrained("./adapter")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256, generation_config=ends)[0]))",
    ]


def _llama_cpp(eos_tokens: Sequence[str]) -> list[str]:
    return [
        "**llama.cpp** and **Ollama** take one GGUF file best, base and adapter merged: `lowrank-tune export RUN "
        "--to gguf` or "
        "`--to ollama` makes it of the run, with a Modelfile, and measures what merging changes. Or the adapter "
        "(`--to gguf-lora`), "
        "over a base; llama.cpp's own converters make the same of this folder and of a folder `./base` with the "
        "base's files:",
        "",
        "```sh",
        "python convert_hf_to_gguf.py ./base --outfile base.gguf",
        "python convert_lora_to_gguf.py ./adapter --base ./base --outfile adapter.gguf",
        "llama-cli -m base.gguf --lora adapter.gguf",
        "```",
        "",
        "with Ollama by `ollama create tuned -f Modelfile`:",
        "",
        "```",
        "FROM ./base.gguf",
        "ADAPTER ./adapter.gguf",
        *(f"PARAMETER stop {quoted(end)}" for end in eos_tokens),
        "```",
        "",
        "A base that is quantized otherwise than in training answers a little differently.",
        "",
    ]


def _reward_usage(base: BaseConfig, revision: str | None) -> list[str]:
    arguments = (
        json.dumps(_base_location(base)) + (f", revision={json.dumps(revision)}" if revision else "") + ", num_labels=1"
    )
    return [
        "It scores a conversation at its last token, with a scalar head (`score`):",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification",
        "",
        f"base = AutoModelForSequenceClassification.from_pretrained({arguments})",
        'model = PeftModel.from_pretrained(base, "./adapter")',
        "```",
        "",
        "vLLM, llama.cpp and Ollama serve no adapter with a head of its own.",
        "",
    ]


def merged_model_card(
    recipe: RecipeConfig,
    base_weights: str,
    table: Sequence[tuple[str, str]],
    rope: FixedRope | None = None,
) -> str:
    """`README.md` of a merged model: what was added to what, and the comparison with what was trained."""
    base = recipe.base.model.partition("@")[0]
    if base_weights == "dequantized":
        into = "the dequantized 4-bit weights that it was trained over"
    else:
        into = "the original weights of the base"
    if recipe.base.bits != 4:
        into = "the weights that it was trained over"
    return "\n".join(
        [
            yaml_front_matter(
                recipe,
                "transformers",
                ["lowrank-tune", "merged", recipe.algorithm],
                relation="finetune",
            ),
            f"# {recipe.name or recipe.algorithm}",
            "",
            f"`{base}` with an adapter trained by `{recipe.algorithm}`, merged into {into}; bf16.",
            "",
            "## Trained against merged",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name.replace('|', chr(92) + '|')} | {value} |" for name, value in table),
            "",
            "It loads like any model of its kind: `AutoModelForCausalLM.from_pretrained`, `vllm serve`; "
            "`lowrank-tune export RUN --to gguf` "
            "makes a file for llama.cpp of it.",
            "",
            *rope_section(rope),
            "## The recipe",
            "",
            "```yaml",
            recipe_text(recipe),
            "```",
            "",
            f"Made with lowrank_tune {__version__}.",
            "",
        ]
    )


def recipe_text(recipe: RecipeConfig) -> str:
    """The recipe in YAML, with adapters by the names of their folders: where on a machine those lie is nobody's
    business."""
    facts = recipe.to_dict()
    for adapter in facts.get("adapters", {}).values():
        if "path" in adapter:
            folder = Path(adapter["path"])
            adapter["path"] = folder.parent.name + "/final" if folder.name == "final" else folder.name
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120).rstrip()
