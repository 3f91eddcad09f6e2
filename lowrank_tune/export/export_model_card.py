"""What lies beside an exported file for people: what it is, how it was made, and how it is used."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune import __version__
from lowrank_tune.config import RecipeConfig
from lowrank_tune.export.model_card import recipe_text, rope_section, yaml_front_matter
from lowrank_tune.model.rotary import FixedRope

Table = Sequence[tuple[str, str]]


def gguf_model_card(
    recipe: RecipeConfig,
    file: str,
    kind: str,
    into: str,
    table: Table,
    eos_tokens: Sequence[str],
    ollama: bool,
    rope: FixedRope | None = None,
) -> str:
    """`README.md` beside the GGUF file of a merged model."""
    weights = {
        "dequantized": "the dequantized 4-bit weights that it was trained over",
        "original": "the original weights of the base",
    }[into]
    if recipe.base.bits != 4:
        weights = "the weights that it was trained over"
    if kind in ("f32", "f16", "bf16", "q8_0"):
        how = "by llama.cpp's own converter"
    else:
        how = "by llama.cpp's own converter and quantizer"
    if kind in ("bf16", "f32"):
        exact = "It holds the merged weights as they are."
    else:
        exact = (
            "The table compares the merged model, in 16 bits, with what was trained; what this type costs more was "
            "not measured."
        )
    if ollama:
        use = ["**Ollama**, in this folder:", "", *_create(recipe)]
    else:
        use = []
    return _page(
        recipe,
        "finetune",
        [
            f"`{_base(recipe)}` with an adapter trained by `{recipe.algorithm}`, merged into {weights}, as one GGUF "
            f"file (`{kind}`) {how}. {exact}",
            "",
            "## Trained against merged",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name.replace('|', chr(92) + '|')} | {value} |" for name, value in table),
            "",
            "## How to use it",
            "",
            *rope_section(rope),
            *use,
            *_llama(f"llama-cli -m {file}"),
            "LM Studio takes the same file: `lms import " + file + "`.",
            "",
            _eos_sentence(eos_tokens),
        ],
    )


def gguf_lora_card(
    recipe: RecipeConfig,
    file: str,
    kind: str,
    start: str | None,
    eos_tokens: Sequence[str],
    rope: FixedRope | None = None,
) -> str:
    """`README.md` beside a GGUF adapter; `start` is what a Modelfile beside it begins with."""
    if start is None:
        use = []
    else:
        use = [
            f"**Ollama**, with the base as `{start}` (the Modelfile's first line; put another file or a name of "
            f"Ollama's library there):",
            "",
            *_create(recipe),
        ]
    return _page(
        recipe,
        "adapter",
        [
            f"A LoRA adapter for `{_base(recipe)}`, trained by `{recipe.algorithm}`, as a GGUF file (`{kind}`) for "
            f"llama.cpp. What it was trained "
            "over is folded into it, and so are the scales that llama.cpp does not know.",
            "",
            "It needs the base as a GGUF file: `python convert_hf_to_gguf.py ./base --outfile base.gguf` of "
            "llama.cpp makes one.",
            "",
            "## How to use it",
            "",
            *rope_section(rope),
            *use,
            *_llama(f"llama-cli -m base.gguf --lora {file}"),
            "A base that is quantized otherwise than in training answers a little differently: `lowrank-tune export "
            "RUN --to gguf` makes one model "
            "of both, and measures the difference.",
            "",
            _eos_sentence(eos_tokens),
        ],
    )


def slug(recipe: RecipeConfig) -> str:
    """The run's name as files and Ollama take it."""
    name = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "-._") else "-"
        for letter in recipe.name or recipe.algorithm
    )
    return name.strip("-.") or recipe.algorithm


def _page(recipe: RecipeConfig, relation: str, body: list[str]) -> str:
    head = yaml_front_matter(recipe, "gguf", ["gguf", "lowrank-tune", recipe.algorithm], relation=relation)
    return "\n".join(
        [
            head,
            f"# {recipe.name or recipe.algorithm}",
            "",
            *body,
            "",
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


def _create(recipe: RecipeConfig) -> list[str]:
    return ["```sh", f"ollama create {slug(recipe)} -f Modelfile", f"ollama run {slug(recipe)}", "```", ""]


def _base(recipe: RecipeConfig) -> str:
    return recipe.base.model.partition("@")[0]


def _llama(command: str) -> list[str]:
    return ["**llama.cpp**:", "", "```sh", command, "```", ""]


def _eos_sentence(eos_tokens: Sequence[str]) -> str:
    return f"An answer ends at {', '.join(f'`{end}`' for end in eos_tokens)}."
