"""The unsloth backend: its rules, its pitfalls with a stand-in for it, and (marked `unsloth`, if it is installed) the
real one compared with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from models import CPU, TOKENIZER, VOCAB, ragged_batch, roles_over, same_bytes, saved_model
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

from lowrank_tune import unsloth_import
from lowrank_tune.cli import app
from lowrank_tune.config import BaseConfig, Chain, Recipe
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model import unsloth
from lowrank_tune.model.base import Base, base_hashes, load_base, nf4_config

HERE = unsloth_import.installed() is not None
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("tiny-sft", [], None),
        ("tiny-dpo", [], None),
        ("tiny-grpo", [], None),
        ("tiny-dpo", ["reference=base"], None),
        (
            "tiny-sft",
            [
                "adapters.policy.path=runs/x",
                "adapters.policy.r=null",
                "adapters.policy.lora_alpha=null",
                "adapters.policy.target_modules=null",
            ],
            None,
        ),
        ("tiny-reward", [], "base.backend: `unsloth` trains sft, dpo, grpo, and not reward"),
        ("tiny-ppo", [], "base.backend: `unsloth` trains sft, dpo, grpo, and not ppo"),
        ("tiny-dpo", ["adapters.sft.path=runs/sft"], "also `sft` (the reference is no longer the base)"),
        (
            "tiny-grpo",
            ["adapters.reward.path=runs/reward", "rewards=[{name: reward_model}]"],
            "also `reward` (the reward model uses",
        ),
    ],
)
def test_what_it_trains(preset: str, overrides: list[str], words: str | None) -> None:
    if words is None:
        assert Recipe.load(preset, "base.backend=unsloth", *overrides).base.backend == "unsloth"
        return
    with pytest.raises(ConfigError) as caught:
        Recipe.load(preset, "base.backend=unsloth", *overrides)
    assert words in str(caught.value) and "use `transformers`" in str(caught.value)


def test_a_chain_lays_adapters_below() -> None:
    with pytest.raises(ConfigError, match="stages.dpo.base.backend.*also `sft`") as caught:
        Chain.load("tiny-preference", "base.backend=unsloth")
    assert len(caught.value.problems) == 1
    stages = tuple(
        stage.model_copy(update={"base": BaseConfig(backend="unsloth")})
        for stage in Chain.load("tiny-preference").stages
    )
    with pytest.raises(ConfigError, match="also `sft`"):
        Chain("mine", "", stages)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No unsloth in this process."""
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)


def versions(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """Sets the installed versions that `importlib.metadata` returns."""

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(unsloth_import.metadata, "version", version)
    monkeypatch.setattr(
        unsloth_import.metadata,
        "requires",
        lambda name: [
            "transformers!=5.0.0,<=5.17.0,>=4.52.4",
            "datasets!=4.4.*,<5.0.0,>=3.4.1",
            "trl<=1.15.0,>=0.18.2",
            "tyro",
            'trl>=9; extra == "new"',
            'torch<2.15; python_version >= "3.0"',
        ],
    )


FITTING = {
    "unsloth": "2026.10.9",
    "transformers": "5.17.0",
    "datasets": "4.8.5",
    "trl": "1.15.0",
    "torch": "2.13.0+cpu",
}


@pytest.mark.usefixtures("absent")
def test_what_prevents_its_use_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch)
    unsloth_import.import_unsloth(["transformers"])
    with pytest.raises(UserError, match="unsloth is not installed: pip install .*constraints/unsloth.txt"):
        unsloth_import.import_unsloth(["unsloth"])
    versions(monkeypatch, **FITTING | {"transformers": "5.23.0", "datasets": "4.4.2", "trl": "1.16.0"})
    with pytest.raises(
        UserError,
        match=r"needs transformers<=5.17.0 \(5.23.0 is installed\), datasets!=4.4.\* \(4.4.2 is installed\), trl<=1",
    ):
        unsloth_import.import_unsloth(["unsloth"])
    versions(monkeypatch, **{name: version for name, version in FITTING.items() if name != "trl"})
    with pytest.raises(UserError, match=r"trl<=1.15.0,>=0.18.2 \(not installed\)"):
        unsloth_import.import_unsloth(["unsloth"])
    versions(monkeypatch, **FITTING)
    assert unsloth_import.incompatible_versions() == []
    with pytest.raises(UserError, match="must be imported before transformers.*`from lowrank_tune import run` before"):
        unsloth_import.import_unsloth(["unsloth"])


@pytest.mark.usefixtures("absent")
def test_its_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is imported without its statistics, with another cache folder and its greeting on stderr; or an error gives
    the reason."""
    seen = {}

    def importing(name: str) -> ModuleType:
        seen.update({key: os.environ.get(key) for key in ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION")})
        os.environ["TOKENIZERS_PARALLELISM"] = "wrong"
        print("hello from", name)
        raise ImportError("torchvision==0.1 is broken\nand more") if seen.pop("breaks", None) else StopIteration

    versions(monkeypatch, **FITTING)
    monkeypatch.setattr(unsloth_import, "PATCHED_PACKAGES", ())
    monkeypatch.setattr(unsloth_import.importlib, "import_module", importing)
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.delenv("UNSLOTH_COMPILE_LOCATION", raising=False)
    monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "0")
    seen["breaks"] = "yes"
    with pytest.raises(UserError, match="cannot be imported: torchvision==0.1 is broken;"):
        unsloth_import.import_unsloth(["unsloth"])
    assert seen == {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "unsloth_compiled")}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and capsys.readouterr() == ("", "hello from unsloth\n")


@pytest.mark.skipif(HERE, reason="unsloth is installed")
def test_the_command_line_reports_that_it_is_missing(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["run", "tiny-sft", "base.backend=unsloth", "--out", str(tmp_path / "run")])
    assert made.exit_code == 2 and "unsloth is not installed" in made.output and not (tmp_path / "run").exists()


ATTENTION, ROTARY = modeling_llama.LlamaAttention, modeling_llama.LlamaRotaryEmbedding


class TheirRotary(ROTARY):
    """As unsloth's: it goes by the number of tokens and minds no positions."""

    def forward(self, x: Any, position_ids: Any) -> Any:
        return super().forward(x, torch.arange(x.shape[1])[None].expand(len(x), -1))


class StandIn:
    """Replaces unsloth on a GPU: forward passes that ignore cache and mask in training, in modules that are marked. Its
    attributes are the faults that must be found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.load_arguments: dict[str, Any] = {}
        self.scale, self.bits, self.extra_words, self.error = 1.0, 4, 0, ""
        self.patch = monkeypatch
        own = ATTENTION.forward

        def gated(module: Any, hidden_states: Any, *rest: Any, **named: Any) -> Any:
            if not getattr(module, "_unsloth_fast_path", False):
                return own(module, hidden_states, *rest, **named)
            assert named.get("past_key_values") is None, "unsloth's forward knows no such cache"
            mask = {"attention_mask": None} if module.training else {}
            return own(module, hidden_states * self.scale, *rest, **named | mask)

        monkeypatch.setattr(ATTENTION, "forward", gated)
        made = ModuleType("unsloth")
        made.FastLanguageModel = self  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "unsloth", made)

    def from_pretrained(self, **arguments: Any) -> tuple[Any, None]:
        self.load_arguments = arguments
        if self.error:
            raise RuntimeError(self.error)
        four = {"quantization_config": nf4_config(CPU)} if self.bits == 4 else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments["model_name"], dtype=arguments["dtype"], **four
        )
        if self.extra_words:
            model.resize_token_embeddings(VOCAB + self.extra_words)
        self.patch.setattr(
            modeling_llama, "_unsloth_pre_patch_originals", ({"LlamaRotaryEmbedding": ROTARY}, {}), raising=False
        )
        self.patch.setattr(modeling_llama, "LlamaRotaryEmbedding", TheirRotary)
        model.model.rotary_emb = TheirRotary(config=model.config)
        for module in model.modules():
            module._unsloth_fast_path = True
        print("unsloth talks")
        return model, None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    yield StandIn(monkeypatch)


def loaded(kind: str = "llama", **more: Any) -> Base:
    return unsloth.load_base(BaseConfig(model=saved_model(kind), backend="unsloth", **more), TOKENIZER, 320, CPU)


def test_the_arguments_of_its_loader(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    plain = load_base(BaseConfig(model=saved_model("llama")), TOKENIZER, CPU)
    base = loaded()
    assert stand_in.load_arguments == {
        "model_name": saved_model("llama"),
        "max_seq_length": 320,
        "dtype": torch.float32,
        "load_in_4bit": True,
        "use_exact_model_name": True,
        "device_map": {"": CPU},
        "use_gradient_checkpointing": False,
        "revision": None,
        "trust_remote_code": False,
    }
    assert (base.name, base.bits, base.backend) == (
        saved_model("llama"),
        4,
        "unsloth",
    ) and "unsloth talks" not in capsys.readouterr().out
    assert base.hashes() == base_hashes(plain.model), (
        "what a run with unsloth made could not be merged into the same base"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_compared_with_transformers(stand_in: StandIn, checkpointing: bool) -> None:
    roles = roles_over(loaded(), checkpointing=checkpointing)
    before = roles.adapter_tensors("policy")
    assert roles.decoder.share_prefixes is False
    unsloth.check(roles, "policy")
    stand_in.scale = 1.1
    with pytest.raises(
        UserError, match="unsloth does not compute what transformers does here: log-probs differ by .* nats per token"
    ):
        unsloth.check(roles, "policy")
    after = roles.adapter_tensors("policy")
    assert all(same_bytes(before[name], after[name]) for name in before)
    assert all(each.grad is None for each in roles.parameters("policy"))
    modules = [module for module in roles.base.model.modules() if hasattr(module, "_unsloth_fast_path")]
    assert (
        all(module._unsloth_fast_path for module in modules) and type(roles.base.model.model.rotary_emb) is TheirRotary
    )


def test_recomputation_with_other_adapters_is_found(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """As re-entrant checkpointing without the context of `Roles` does: adapters are off when it recomputes."""
    roles = roles_over(loaded(), checkpointing=True)
    roles.base.model.gradient_checkpointing_enable({"use_reentrant": True})
    roles.base.model.enable_input_require_grads()
    original = unsloth._logps_and_gradient
    calls = []

    def then(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 2:  # the plain side recomputes nothing
            roles.base.model.gradient_checkpointing_disable()
        return original(*arguments)

    monkeypatch.setattr(unsloth, "_logps_and_gradient", then)
    with pytest.raises(UserError, match="the gradient by .*%"):
        unsloth.check(roles, "policy")


def test_completions_are_drawn_as_without_it(stand_in: StandIn) -> None:
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]

    def drawn(base: Base) -> list[tuple[int, list[int], list[float]]]:
        found = Engine(roles_over(base), "policy").generate(prompts, 3, SamplingParams(6, frozenset(), seed=3))
        return sorted((one.prompt, one.token_ids, one.logps) for one in found)

    theirs = drawn(load_base(BaseConfig(model=saved_model("llama")), TOKENIZER, CPU))
    assert drawn(loaded()) == theirs


def test_log_probs_are_those_of_transformers(stand_in: StandIn) -> None:
    batch = ragged_batch()
    transformers_roles = roles_over(load_base(BaseConfig(model=saved_model("llama")), TOKENIZER, CPU))
    transformers_roles.decoder.packed_rows.enabled = False
    theirs = transformers_roles.logps("policy", batch).logps
    assert torch.equal(roles_over(loaded()).logps("policy", batch).logps, theirs)


def test_what_it_does_in_silence_is_refused(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llama, mistral, qwen2, qwen3 models, and .* is gemma2; use `transformers`"):
        loaded("gemma2")
    stand_in.bits = 16
    with pytest.raises(UserError, match="without 4 bits, which was not set"):
        loaded()
    stand_in.bits, stand_in.extra_words = 4, 8
    with pytest.raises(UserError, match="from 97 to 105 tokens"):
        loaded()
    stand_in.error = "no kernel image\nat all"
    with pytest.raises(UserError, match="unsloth cannot load .*: no kernel image; use `transformers`"):
        loaded()


def test_an_unsloth_that_works_otherwise_is_refused(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is marked, or the replaced code is not kept, the code of transformers and of unsloth look the same."""
    model = loaded().model
    monkeypatch.setattr(modeling_llama, "_unsloth_pre_patch_originals", ({}, {}))
    with pytest.raises(UserError, match="patches transformers in another way"):
        unsloth._restore_transformers_forward(model, CPU)
    for module in model.modules():
        del module._unsloth_fast_path
    unsloth._restore_transformers_forward(model, CPU)
    with pytest.raises(UserError, match="patches transformers in another way"):
        unsloth._restore_transformers_forward(model, torch.device("cuda"))


@pytest.mark.skipif(not HERE, reason="unsloth is not installed")
@pytest.mark.unsloth
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("tiny-sft", ["train.gradient_checkpointing=true"]),
        ("tiny-sft", ["base.bits=16"]),
        ("tiny-dpo", ["data.train=[{dataset: builtin:arithmetic-preferences, max_samples: 40}]"]),
        ("tiny-grpo", ["train.prompts_per_step=4", "rollout.num_generations=4"]),
    ],
)
def test_the_real_one_does_the_same_steps(tmp_path: Path, preset: str, overrides: list[str]) -> None:
    """Each in a process of its own: what unsloth replaces, it replaces for all that a process does."""
    losses = {}
    length = ["train.num_train_epochs=null"] if preset != "tiny-grpo" else []
    for backend in ("unsloth", "transformers"):
        words = [
            *overrides,
            *length,
            f"base.backend={backend}",
            "train.max_steps=3",
            "train.logging_steps=1",
            "evaluate.num_prompts=2",
            "evaluate.num_samples=1",
            "evaluate.num_completions_to_print=1",
            "--ui",
            "plain",
            "--out",
            str(tmp_path / backend),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOWRANK_TUNE_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-m", "lowrank_tune", "run", preset, *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("unsloth runs the base, and computes what transformers does" in done.stdout) == (backend == "unsloth")
        assert "Unsloth" not in done.stdout
        events = [json.loads(line) for line in (tmp_path / backend / "events.jsonl").read_text().splitlines()]
        losses[backend] = [event["stats"]["loss"] for event in events if event["event"] == "step_end"]
    assert len(losses["transformers"]) == 3 and losses["unsloth"] == pytest.approx(
        losses["transformers"], rel=1e-5, abs=1e-7
    )
    assert not list(tmp_path.glob("unsloth_compiled*")), "unsloth left its cache beside the user's files"
    config = json.loads((tmp_path / "unsloth" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-tutor"
