"""`final/` as software that never heard of this kit finds it: card, tokenizer, template, end tokens, and what later
runs read of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_fixtures import IDS, FinishedRun, kl, make_run
from models import TOKENIZER
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig

from lowrank_tune import Recipe, UserError
from lowrank_tune.assembly import check_adapter_lineage
from lowrank_tune.checkpoint import load
from lowrank_tune.config import BaseConfig, dump
from lowrank_tune.data import ChatTemplate
from lowrank_tune.data.message import Message
from lowrank_tune.events import Event, LogMessage
from lowrank_tune.export.model_card import Adapters, model_card, rank_limit
from lowrank_tune.model.adapters import SavedAdapter, read_adapter
from lowrank_tune.model.base import load_base

CONVERSATION = [
    Message("system", "Be kind."),
    Message("user", "What is 12 + 30?"),
    Message("assistant", "It is 42."),
    Message("user", "$5?"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("folded"), lower=("warm", "sft"), rslora=True)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("apart"), lower=("sft",), stack="separate")


def code_of(text: str) -> str:
    """The Python that a card shows."""
    return text.partition("```python\n")[2].partition("```")[0]


def written(adapters: Adapters, **changes: Any) -> str:
    recipe = Recipe.from_dict(
        {
            "name": "mine",
            "algorithm": "sft",
            "data": {"train": [{"dataset": "openai/gsm8k", "config_name": "main"}]},
            "base": {"model": "Qwen/Qwen3-4B@abc123"},
            "train": {"max_steps": 7},
        }
        | changes
    )
    return model_card(
        recipe,
        {"step": 7, "heldout_details": {"base": {"accuracy": 0.25}, "sft": {"accuracy": 0.75}}},
        "abc123",
        adapters,
        ["<|im_end|>"],
    )


def config(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"]}


def test_a_model_card_has_metadata_for_the_hub_and_text_for_readers() -> None:
    text = written(Adapters(["sft", "policy"], True, config(24), is_generative=True))
    facts = yaml.safe_load(text.split("---")[1])
    assert (
        facts["base_model"] == "Qwen/Qwen3-4B"
        and facts["library_name"] == "peft"
        and facts["datasets"] == ["openai/gsm8k"]
    )
    for part in (
        "`abc123`",
        "combined exactly in this one",
        "Rank 24, alpha 32, on q_proj, v_proj",
        "| sft | 0.75 |",
        "7 steps",
        "<|im_end|>",
        "llama-cli",
        "FROM ./base.gguf",
        "vllm serve Qwen/Qwen3-4B",
        'revision="abc123"',
    ):
        assert part in text, part
    compile(code_of(text), "card", "exec")
    assert yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["train"]["max_steps"] == 7


@pytest.mark.parametrize(("rank", "limit"), [(8, None), (16, None), (17, 32), (32, 32), (65, 128), (257, 320)])
def test_limit_of_vllm_is_in_the_card_if_it_must_be_raised(rank: int, limit: int | None) -> None:
    text = written(Adapters(["policy"], True, config(rank), is_generative=True))
    assert (f"--max-lora-rank {limit} " in text) if limit else ("--max-lora-rank" not in text)
    assert rank_limit(513) is None and "lowrank-tune merge" in written(
        Adapters(["policy"], True, config(600), is_generative=True)
    )
    assert "--enable-lora" not in written(Adapters(["policy"], True, config(600), is_generative=True))


def test_a_card_of_files_names_nothing_of_the_hub(folded: FinishedRun) -> None:
    text = (folded.run / "final" / "README.md").read_text()
    facts = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in facts and "datasets" not in facts
    assert "somebody" not in text and "path: sft/final" in text, "where earlier runs lie is nobody's business"
    assert str(folded.base) in text, "but what the user named as the base stays"


def test_final_holds_all_that_is_needed_and_names_no_machine(folded: FinishedRun) -> None:
    final = folded.run / "final"
    load(final, "final")
    reloaded = AutoTokenizer.from_pretrained(final)
    prompt_ids = reloaded.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in CONVERSATION], add_generation_prompt=True, return_dict=False
    )
    assert list(prompt_ids) == ChatTemplate.from_tokenizer(AutoTokenizer.from_pretrained(folded.base)).prompt(
        CONVERSATION
    )
    ends = GenerationConfig.from_pretrained(final).eos_token_id
    assert [reloaded.convert_ids_to_tokens(one) for one in ends] == ["<|end_of_text|>", "<|end_of_turn|>"]
    for file in (
        "tokenizer_config.json",
        "tokenizer.json",
        "generation_config.json",
        "policy/adapter_config.json",
        "stack.json",
    ):
        text = (final / file).read_text()
        assert (
            str(folded.run) not in text and "somebody" not in text and "/tmp" not in text.replace(str(folded.base), "")
        ), file


def test_a_tokenizer_that_cannot_be_saved_costs_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(built: Any) -> dict[str, bytes]:
        raise NotImplementedError("no vocabulary file")

    monkeypatch.setattr("lowrank_tune.training.final_adapter.tokenizer_files", broken)
    made = make_run(tmp_path)
    assert (made.run / "final" / "adapter_model.safetensors").exists() and not (
        made.run / "final" / "tokenizer.json"
    ).exists()


def test_the_python_of_the_card_works_for_a_stack_kept_apart(
    apart: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = code_of((apart.run / "final" / "README.md").read_text())
    assert "set_adapter" in code and "adapter/sft" in code
    base = load_base(BaseConfig(model=str(apart.base)), TOKENIZER, CPU)
    lines = [
        line.replace("./adapter", str(apart.run / "final")) for line in code.splitlines() if line.startswith("model")
    ]
    place: dict[str, Any] = {"PeftModel": PeftModel, "base": base.model}
    for line in lines:
        exec(line, place)
    with torch.no_grad():
        assert kl(apart.logits, place["model"].eval()(input_ids=IDS).logits[0]) < 1e-8


# ---- what later runs read


def attached(made: FinishedRun, *frozen: tuple[str, SavedAdapter]) -> tuple[dict[str, SavedAdapter], list[Event]]:
    """The adapters of a recipe that goes on from `made` over these."""
    path, events = str(made.run), list[Event]()
    adapters = {**{name: {"path": str(one.folder)} for name, one in frozen}, "policy": {"path": path}}
    recipe = Recipe.from_dict(
        {
            "algorithm": "sft",
            "data": {"train": [{"dataset": "builtin:arithmetic"}]},
            "train": {"max_steps": 1},
            "adapters": adapters,
        }
    )
    saved = {**dict(frozen), "policy": read_adapter(path, "adapters.policy.path")}
    check_adapter_lineage(recipe, saved, events.append)
    return saved, events


def lower_of(made: FinishedRun, name: str, kept: FinishedRun) -> SavedAdapter:
    """A frozen adapter as it lay below: another run of the same seed keeps it apart."""
    return read_adapter(str(kept.run / "final" / name), "x")


def test_continued_run_uses_its_own_adapter_over_the_same_ones(apart: FinishedRun, tmp_path: Path) -> None:
    made = make_run(tmp_path, lower=("sft",))
    sft = lower_of(made, "sft", apart)
    saved, events = attached(made, ("sft", sft))
    assert saved["policy"].config.r == 4 and not events and saved["policy"].folder == made.run / "final" / "policy"
    saved, events = attached(made)
    assert saved["policy"].config.r == 8 and [event for event in events if isinstance(event, LogMessage)][
        0
    ].message.endswith("taken with sft folded into it, which it was trained over")
    with pytest.raises(UserError, match="contains its adapters separately.*: load sft below it"):
        attached(apart)


def test_half_a_stack_is_refused(folded: FinishedRun, tmp_path: Path) -> None:
    kept = make_run(tmp_path, lower=("warm", "sft"), rslora=True, stack="separate")
    both = [(name, lower_of(folded, name, kept)) for name in ("warm", "sft")]
    assert attached(folded, *both)[0]["policy"].config.r == 4
    with pytest.raises(
        UserError, match="was trained over warm, sft, and this recipe loads only sft below it: add `adapters.warm.path`"
    ):
        attached(folded, both[1])
    assert attached(folded)[0]["policy"].config.r == 12


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"stack": ["a"], "frozen_adapters": {"b": "0"}}',
        '{"stack": ["..", "p"], "frozen_adapters": {"..": "0"}}',
        "nonsense",
    ],
)
def test_a_broken_stack_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "stack.json").write_text(text)
    with pytest.raises(UserError, match=r"stack\.json is broken"):
        read_adapter(str(tmp_path), "adapters.sft.path")


def test_separate_final_adapters_without_frozen_ones_is_an_error() -> None:
    data = {
        "algorithm": "sft",
        "data": {"train": [{"dataset": "builtin:arithmetic"}]},
        "train": {"max_steps": 1, "final_adapters": "separate"},
    }
    with pytest.raises(UserError, match=r"train\.final_adapters: `separate` does nothing here"):
        Recipe.from_dict(data)
    over = Recipe.from_dict(data | {"adapters": {"sft": {"path": "runs/sft"}}})
    assert "final_adapters: separate" in dump(over)
