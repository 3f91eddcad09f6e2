"""Presets run two steps: base, tokenizer and data swapped for tiny local ones, every other setting kept.

Of presets that differ in their base alone, the first one runs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fixtures import write_rows
from models import random_model
from test_presets import HUB, NAMES, stages_of
from torch import Tensor

from lowrank_tune import run
from lowrank_tune.config import BaseConfig, Chain, Recipe, load_any
from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.model.base import load_tokenizer

# The probability of an end token in this model, so that completions are short for any limit.
ENDS = 0.15
STEPS = ("train.max_steps=2", "train.warmup_steps=1")
TINY = [name for name in NAMES if name.startswith("tiny-")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and rows of every data set."""
    folder = tmp_path_factory.mktemp("presets")
    for dataset in HUB:
        write_rows(folder, dataset, range(2, 82))
    (folder / "heldout").mkdir()
    write_rows(folder / "heldout", "openai/gsm8k", range(100, 108))
    make_base(folder / "base")
    return folder


def make_base(folder: Path) -> None:
    """Saves a random Llama with the tutor's tokenizer and long rows, whose completions end after a few tokens."""
    tokenizer = load_tokenizer(BaseConfig())
    # Presets of Qwen3 set this variable.
    own = ChatTemplate.from_tokenizer(tokenizer).chat_template
    tokenizer.chat_template = "{% if enable_thinking %}{% endif %}" + own
    model = random_model("llama", gain=1.0, vocab_size=len(tokenizer), max_position_embeddings=8192)
    ends = sorted(ChatTemplate.from_tokenizer(tokenizer).end_ids)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0  # a feature that is always there, and that no layer writes to
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        ids = torch.randint(0, len(tokenizer), (4, 64), generator=torch.Generator().manual_seed(0))
        low, high = -10.0, 10.0
        while high - low > 0.01:
            model.lm_head.weight[ends, 0] = (low + high) / 2
            low, high = ((low + high) / 2, high) if _ending(model, ids, ends) < ENDS else (low, (low + high) / 2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _ending(model: Any, ids: Tensor, ends: list[int]) -> float:
    return float(model(input_ids=ids).logits.softmax(-1)[..., ends].sum(-1).mean())


def sources(given: Any, folder: Path) -> str:
    """The same sources, as files of their own shape."""
    kept = [source.model_dump(mode="json", exclude={"config_name", "split"}, exclude_none=True) for source in given]
    return json.dumps(
        [{**source, "dataset": str(folder / f"{source['dataset'].split('/')[1]}.jsonl")} for source in kept]
    )


def swapped(name: str, folder: Path) -> Recipe | Chain:
    """The preset over the tiny base and the local rows."""
    overrides = [f"base.model={folder / 'base'}", *STEPS]
    loaded = load_any(name)
    for stage in stages_of(name):
        where = f"stages.{stage.name}." if isinstance(loaded, Chain) else ""
        overrides.append(f"{where}data.train={sources(stage.data.train, folder)}")
        if stage.evaluate.eval_dataset is not None:
            overrides.append(
                f"{where}evaluate.eval_dataset={json.dumps({'dataset': str(folder / 'heldout' / 'gsm8k.jsonl')})}"
            )
        if "sft" in stage.adapters:
            overrides.append(f"{where}adapters.sft.path={_sft_of(folder)}")
    return load_any(name, *overrides)


@functools.cache
def _sft_of(folder: Path) -> str:
    """Returns the folder of a run for the second step of MyLLM."""
    done = run(swapped("myllm-sft", folder), out=folder / "myllm-sft-below", ui="none")
    assert done.status == "done"
    return str(folder / "myllm-sft-below")


def kept(recipe: Any) -> dict[str, Any]:
    """All that is not swapped."""
    settings = recipe.to_dict()
    swapped = {
        "base": ("model",),
        "data": ("train",),
        "train": ("max_steps", "num_train_epochs", "warmup_steps"),
        "evaluate": ("eval_dataset",),
    }
    for section, key in ((section, key) for section, keys in swapped.items() for key in keys):
        settings[section].pop(key, None)
    settings["adapters"] = {
        name: {key: value for key, value in each.items() if key != "path"}
        for name, each in settings["adapters"].items()
    }
    return {key: value for key, value in settings.items() if key not in ("name", "description")}


def first_of_each_recipe() -> list[str]:
    """Returns presets whose recipes differ in more than their base."""
    found: dict[str, str] = {}
    for name in NAMES:
        if name not in TINY:
            recipes = [
                (kept(stage), [source.model_dump(mode="json") for source in stage.data.train])
                for stage in stages_of(name)
            ]
            found.setdefault(json.dumps(recipes), name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_each_recipe())
def test_a_preset_runs_two_steps(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(place / "cache"))
    recipe = swapped(name, place)
    for stage, preset in zip(recipe.stages if isinstance(recipe, Chain) else (recipe,), stages_of(name), strict=True):
        assert kept(stage) == kept(preset)
    outcome = run(recipe, out=tmp_path / "run", ui="none")
    assert outcome.status == "done"
    for stage in stages_of(name):
        folder = next((tmp_path / "run").glob(f"*{stage.name}")) if isinstance(recipe, Chain) else tmp_path / "run"
        steps = [
            event
            for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
            if event["event"] == "step_end"
        ]
        assert [event["step"] for event in steps] == [1, 2] and not any(
            event["stats"].get("skipped_steps") for event in steps
        )
        assert (folder / "final" / "adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_preset_runs_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and data of these ship with the package, so nothing is swapped but how many rows, prompts and held-out
    answers there are."""
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    assert run(load_any(name, "train.max_steps=2", *_few(name)), out=tmp_path / "run", ui="none").status == "done"


def _few(name: str) -> list[str]:
    """So few of them that two steps are most of the work."""
    overrides: list[str] = []
    for stage in stages_of(name):
        where = f"stages.{stage.name}." if len(stages_of(name)) > 1 else ""
        overrides += [
            f"{where}data.train.0.max_samples=64",
            *([f"{where}data.validation.0.max_samples=8"] if stage.data.validation else []),
        ]
        overrides += (
            [f"{where}evaluate.num_prompts=4", f"{where}evaluate.num_samples=2"] if stage.evaluate.eval_dataset else []
        )
        overrides += [f"{where}train.prompts_per_step=4"] if stage.rewards else []
    return overrides


@pytest.mark.slow
def test_an_sft_that_never_ends_gives_a_warning(tmp_path: Path) -> None:
    """Few rows of one's own behind a preset for many: its epochs are fewer steps than its warm-up."""
    events: list[Any] = []
    few = (
        "data.train=[{dataset: builtin:arithmetic, max_samples: 16}]",
        "train.num_train_epochs=1",
        "train.warmup_steps=40",
        "evaluate.eval_dataset=null",
        "evaluate.num_prompts=null",
        "evaluate.num_samples=null",
        "evaluate.num_completions_to_print=0",
        "evaluate.max_new_tokens=null",
    )
    assert run("tiny-sft", *few, out=tmp_path / "run", ui="none", on_event=events.append).status == "done"
    warned = [event.message for event in events if getattr(event, "level", "") == "warning"]
    assert any("train.warmup_steps: 40, of 1 steps in all" in message for message in warned), warned


def test_a_model_that_ends(place: Path) -> None:
    from transformers import AutoModelForCausalLM  # heavy, and only here

    tokenizer = load_tokenizer(BaseConfig(model=str(place / "base")))
    template = ChatTemplate.from_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    ids = torch.tensor([template.prompt([Message("user", "Say 5.")])])
    assert 0.02 < _ending(model, ids, sorted(template.end_ids)) < 0.6
