"""What both sides begin with: the SFT adapter, the base with this adapter merged, the first adapter of each seed, and
the prompts or pairs."""

from __future__ import annotations

from typing import Any

from learning_curves.task import ALPHA, RANK, SFT, GradedPrompt, Pair, Task, shuffled

PRESETS = {"grpo": "tiny-grpo", "dpo": "tiny-dpo"}
SPARE = 32
"""More rows than are used, because some may be unusable."""


def make_shared(task: Task, small: bool) -> None:
    """Trains the SFT adapter (preset tiny-sft, base in 16 bits, seed 0), and merges it into the base for TRL."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lowrank_tune import run
    from lowrank_tune.toy import problems

    few = ["train.max_steps=2", "evaluate.num_prompts=4", "evaluate.num_samples=2"] if small else []
    run("tiny-sft", "base.bits=16", *few, out=task.root / "sft-run", ui="none")
    (task.root / "sft-run" / "final").rename(task.sft)
    folder = str(problems.__file__).replace("problems.py", "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    PeftModel.from_pretrained(model, task.sft).merge_and_unload().save_pretrained(task.merged)


def make_task(task: Task) -> None:
    """Writes the first adapter and the units of a comparison."""
    task.folder.mkdir()
    task.write_units(prompts(task) if task.settings.algorithm == "grpo" else pairs(task))
    save_first_adapter(task)


def save_first_adapter(task: Task) -> None:
    """Writes a fresh adapter with the shapes of the SFT adapter: A as PEFT draws it, B zero."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(task.seed)
    tensors = {}
    for name, tensor in sorted(load_file(task.sft / "adapter_model.safetensors").items()):
        tensors[name] = torch.zeros(tensor.shape)
        if "lora_A" in name:
            bound = tensor.shape[1] ** -0.5
            tensors[name].uniform_(-bound, bound, generator=generator)
    save_file(tensors, task.first_adapter)


def recipe_of(algorithm: str, seed: int, count: int) -> Any:
    """Returns the preset's recipe with `count` training rows that the seed draws, none of them for validation."""
    from lowrank_tune import Recipe

    dataset = "builtin:arithmetic" if algorithm == "grpo" else "builtin:arithmetic-preferences"
    rows = f"data.train=[{{dataset: {dataset}, max_samples: {count}}}]"
    fractions = ["data.eval_fraction=0"] if algorithm == "dpo" else []
    return Recipe.load(PRESETS[algorithm], f"seed={seed}", "base.bits=16", rows, *fractions)


def template_of(recipe: Any) -> Any:
    """Returns the chat template of a recipe's base."""
    from lowrank_tune.data import ChatTemplate
    from lowrank_tune.model.base import load_tokenizer

    return ChatTemplate.from_tokenizer(load_tokenizer(recipe.base))


def prompts(task: Task) -> list[GradedPrompt]:
    """Returns the prompts of all steps, each with its gold answer."""
    from lowrank_tune.assembly.rl import load_train_prompts
    from lowrank_tune.events import ignore_event

    count = task.settings.steps * task.settings.units
    recipe = recipe_of("grpo", task.seed, count + SPARE)
    template = template_of(recipe)
    examples = load_train_prompts(recipe, template, ignore_event).examples
    graded = [
        GradedPrompt(list(example.input_ids), template.tokenizer.decode(example.input_ids), str(example.ground_truth))
        for example in examples
    ]
    return shuffled(graded, count, task.seed)


def pairs(task: Task) -> list[Pair]:
    """Returns the pairs of all steps."""
    from lowrank_tune.data import load
    from lowrank_tune.events import ignore_event

    count = task.settings.steps * task.settings.units
    recipe = recipe_of("dpo", task.seed, count + SPARE)
    store = load(recipe.data, template_of(recipe), task.seed, ignore_event, pairs=True).train
    found = [pair_of(store[2 * unit], store[2 * unit + 1]) for unit in range(store.units)]
    return shuffled(found, count, task.seed)


def pair_of(chosen_row: Any, rejected_row: Any) -> Pair:
    """Returns the pair of a chosen and a rejected row."""
    from lowrank_tune.evaluation.questions import split_row

    prompt, chosen = split_row(chosen_row)
    _, rejected = split_row(rejected_row)
    return Pair(prompt, chosen, rejected)


def stacked_roles(task: Task) -> tuple[Any, Any]:
    """Returns the base with its tokenizer's chat template, and the roles of the kit over it: the frozen SFT adapter
    below the policy, which begins with the first adapter. The reference is the base with the SFT adapter."""
    import torch
    from safetensors.torch import load_file

    from lowrank_tune.config import AdapterConfig
    from lowrank_tune.model.adapters import lora_config, read_adapter
    from lowrank_tune.model.base import load_base
    from lowrank_tune.model.roles import Roles

    recipe = recipe_of(task.settings.algorithm, task.seed, 1)
    template = template_of(recipe)
    base = load_base(recipe.base, template.tokenizer, torch.device("cpu"))
    sft = read_adapter(str(task.sft), SFT)
    config = lora_config(AdapterConfig(r=RANK, lora_alpha=ALPHA), base.model)
    stacks = {"policy": [SFT, "policy"], "reference": [SFT]}
    roles = Roles(base, {SFT: sft.config, "policy": config}, ["policy"], stacks)
    roles.load_adapter_tensors(SFT, sft.tensors, SFT)
    roles.load_adapter_tensors("policy", load_file(task.first_adapter), "policy")
    return template, roles
