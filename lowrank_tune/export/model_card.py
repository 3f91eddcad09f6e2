"""Model cards, rendered from `templates/`: what a folder contains, how it was made, its metrics, and how to use it in
other software. A card contains no path except those that the user named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lowrank_tune import __version__
from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.export.gguf.model import NATIVE_OUTTYPES
from lowrank_tune.export.ollama import quoted
from lowrank_tune.model.base_source import BUILTIN_MODEL
from lowrank_tune.model.rotary import FixedRope

VLLM_RANK_LIMITS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`."""
DEFAULT_VLLM_RANK = 16
"""Its default."""
MAX_LISTED_MODULES = 12
TRAINED_ON = {
    "sft": "answers",
    "reward": "preference pairs, as a reward model",
    "dpo": "preference pairs (DPO)",
    "kto": "answers marked as desirable or undesirable (KTO)",
    "ppo": "rewards (PPO)",
    "grpo": "rewards (GRPO)",
}
MERGED_INTO = {
    "dequantized": "the dequantized 4-bit weights that it was trained over",
    "original": "the original weights of the base",
}

Table = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Adapters:
    """The adapters in `final/`: the names of the stack, lowest first, whether the root combines all of them, the
    `adapter_config.json` of the root, whether it generates text (a reward model does not), whether its modules are
    those of a multimodal class, and the dtype in which to load the base."""

    names: Sequence[str]
    combined: bool
    config: Mapping[str, Any]
    is_generative: bool
    is_multimodal: bool = False
    dtype: str = "bfloat16"


def model_card(
    recipe: RecipeConfig,
    summary: Mapping[str, Any],
    revision: str | None,
    adapters: Adapters,
    eos_tokens: Sequence[str],
    rope: FixedRope | None = None,
) -> str:
    """Returns the `README.md` of `final/`."""
    base, _, pinned_revision = recipe.base.model.partition("@")
    heldout = summary.get("heldout_details", {})
    metrics: dict[str, None] = {}
    for stats in heldout.values():
        metrics |= dict.fromkeys(stats)
    best_step = None
    if recipe.train.load_best_model_at_end:
        best_step = summary.get("best", {}).get("step")
    return _render(
        "adapter.md.j2",
        recipe,
        [
            "lora",
            "qlora",
            "lowrank-tune",
            recipe.algorithm,
        ],
        rope,
        library="peft",
        relation="adapter",
        summary=summary,
        revision=revision,
        pinned_revision=pinned_revision,
        adapters=adapters,
        is_stack=len(adapters.names) > 1 and not adapters.combined,
        auto_class="AutoModelForImageTextToText" if adapters.is_multimodal else "AutoModelForCausalLM",
        eos_tokens=eos_tokens,
        trained_on=TRAINED_ON[recipe.algorithm],
        builtin_base=BUILTIN_MODEL,
        base_location="./base" if base == BUILTIN_MODEL else base,
        modules=_list_modules(adapters.config["target_modules"]),
        sources=[(source.dataset, _source_details(source)) for source in recipe.data.train],
        best_step=best_step,
        heldout=heldout,
        heldout_metrics=list(metrics),
        figures=_figures(summary),
        vllm_rank=rank_limit(int(adapters.config["r"])),
        default_vllm_rank=DEFAULT_VLLM_RANK,
        max_vllm_rank=VLLM_RANK_LIMITS[-1],
    )


def merged_model_card(
    recipe: RecipeConfig,
    base_weights: str,
    comparison: Table,
    rope: FixedRope | None = None,
) -> str:
    """Returns the `README.md` of a merged model, with its comparison with the trained model."""
    return _render(
        "merged.md.j2",
        recipe,
        ["lowrank-tune", "merged", recipe.algorithm],
        rope,
        library="transformers",
        relation="finetune",
        weights=_merged_into(recipe, base_weights),
        comparison=comparison,
    )


def gguf_model_card(
    recipe: RecipeConfig,
    file: str,
    kind: str,
    base_weights: str,
    comparison: Table,
    eos_tokens: Sequence[str],
    is_ollama: bool,
    rope: FixedRope | None = None,
) -> str:
    """Returns the `README.md` for the GGUF file of a merged model; `kind` is the type of its tensors."""
    return _render(
        "gguf.md.j2",
        recipe,
        ["gguf", "lowrank-tune", recipe.algorithm],
        rope,
        library="gguf",
        relation="finetune",
        file=file,
        kind=kind,
        is_quantized=kind not in NATIVE_OUTTYPES,
        weights=_merged_into(recipe, base_weights),
        comparison=comparison,
        eos_tokens=eos_tokens,
        is_ollama=is_ollama,
    )


def gguf_lora_card(
    recipe: RecipeConfig,
    file: str,
    kind: str,
    ollama_base: str | None,
    eos_tokens: Sequence[str],
    rope: FixedRope | None = None,
) -> str:
    """Returns the `README.md` for a GGUF adapter; `ollama_base` is the base in the Modelfile, None without one."""
    return _render(
        "gguf_lora.md.j2",
        recipe,
        ["gguf", "lowrank-tune", recipe.algorithm],
        rope,
        library="gguf",
        relation="adapter",
        file=file,
        kind=kind,
        ollama_base=ollama_base,
        eos_tokens=eos_tokens,
    )


def _render(
    template: str,
    recipe: RecipeConfig,
    tags: Sequence[str],
    rope: FixedRope | None,
    *,
    library: str,
    relation: str,
    **values: Any,
) -> str:
    """Renders a template with `values` and what all cards contain."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _format_number
    environment.filters["json"] = json.dumps
    environment.filters["modelfile_quoted"] = quoted
    return environment.get_template(template).render(
        values,
        recipe=recipe,
        base=recipe.base.model.partition("@")[0],
        title=recipe.name or recipe.algorithm,
        name=slug(recipe),
        front_matter=yaml_front_matter(
            recipe,
            library,
            tags,
            relation,
        ),
        rope_sentence=rope_sentence(rope),
        recipe_text=recipe_text(recipe),
        version=__version__,
    )


def yaml_front_matter(
    recipe: RecipeConfig,
    library: str,
    tags: Sequence[str],
    relation: str,
) -> str:
    """Returns the metadata of a card, which the hub reads. It contains ids of the hub, and no names of files."""
    metadata: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": list(tags),
    }
    base = recipe.base.model.partition("@")[0]
    if looks_like_hub_id(base):
        metadata["base_model"] = base
        metadata["base_model_relation"] = relation
    datasets = [source.dataset.partition("@")[0] for source in recipe.data.train]
    hub_datasets = [dataset for dataset in datasets if looks_like_hub_id(dataset)]
    if hub_datasets:
        metadata["datasets"] = list(dict.fromkeys(hub_datasets))
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n"


def looks_like_hub_id(name: str) -> bool:
    """Returns whether a name has the form owner/name of the hub, and is not a file or folder here."""
    owner, _, rest = name.partition("/")
    has_form = bool(owner and rest) and "/" not in rest and not name.startswith((".", "~"))
    return has_form and not Path(name).exists()


def rope_sentence(rope: FixedRope | None) -> str:
    """Returns how to select the rotary frequencies of the training in software that selects them by the length of its
    context; empty if the base has one set."""
    if rope is None:
        return ""
    length = f"{rope.original_length:,}"
    context = f"at most {length} tokens"
    if rope.factors is None:
        other = "longer rows change the frequencies of RoPE type `dynamic`"
    elif rope.factors == "long":
        context = f"more than {length} tokens"
        other = "a shorter one selects the short factors"
    else:
        other = "a longer one selects the long factors"
    flags = "vLLM's `--max-model-len`, llama.cpp's `-c`"
    return f"It was trained with the {rope.name}: serve it with a context of {context} ({flags}); {other}."


def rank_limit(rank: int) -> int | None:
    """Returns the smallest `--max-lora-rank` of vLLM for this rank, None if the rank is too high."""
    for limit in VLLM_RANK_LIMITS:
        if limit >= rank:
            return limit
    return None


def recipe_text(recipe: RecipeConfig) -> str:
    """Returns the recipe in YAML. Paths of adapters are reduced to the names of their folders, since the folders of a
    machine are private."""
    data = recipe.to_dict()
    for adapter in data.get("adapters", {}).values():
        if "path" in adapter:
            folder = Path(adapter["path"])
            if folder.name == "final":
                adapter["path"] = f"{folder.parent.name}/final"
            else:
                adapter["path"] = folder.name
    return yaml.safe_dump(
        data,
        sort_keys=False,
        allow_unicode=True,
        width=120,
    ).rstrip()


def slug(recipe: RecipeConfig) -> str:
    """Returns the run's name with the characters that file names and Ollama allow."""
    letters = []
    for letter in recipe.name or recipe.algorithm:
        is_allowed = letter.isascii() and (letter.isalnum() or letter in "-._")
        letters.append(letter if is_allowed else "-")
    return "".join(letters).strip("-.") or recipe.algorithm


def _merged_into(recipe: RecipeConfig, base_weights: str) -> str:
    if recipe.base.bits != 4:
        return "the weights that it was trained over"
    return MERGED_INTO[base_weights]


def _list_modules(targets: Any) -> str:
    """Returns the names of the modules with an adapter, or their number."""
    if isinstance(targets, list) and len(targets) <= MAX_LISTED_MODULES:
        return ", ".join(targets)
    return f"{len(targets)} modules"


def _source_details(source: SourceConfig) -> str:
    details = [f"split {source.split}"]
    if source.config_name:
        details.insert(0, source.config_name)
    if source.format != "auto":
        details.append(source.format)
    if source.max_samples:
        details.append(f"{source.max_samples:,} rows")
    if source.weight:
        details.append(f"weight {source.weight:g}")
    return ", ".join(details)


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metrics of the best step and of held-out pairs, else those of the last step."""
    figures = {f"best step, {key}": value for key, value in summary.get("best", {}).items() if key != "step"}
    for key, value in summary.get("heldout_pairs", {}).items():
        figures[f"held-out pairs, {key}"] = value
    if figures:
        return figures
    last = summary.get("last", {})
    return {f"last step, {key}": value for key, value in last.items() if key in ("loss", "reward", "kl")}


def _format_number(value: object) -> str:
    if isinstance(value, (int, float)):
        return f"{value:.4g}"
    if value is None:
        return ""
    return str(value)
