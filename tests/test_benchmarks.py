"""The benchmarks run; the smoke test of a card runs tiny on the CPU, with the packages of such a machine only, and its checks can fail."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

MISSING_THERE = ("datasets", "pydantic", "trl", "pyarrow")
"""What a machine with a card and without network has not. (`transformers` itself needs yaml, and brings typer and rich.)"""
BLOCKED = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING_THERE}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(FOLDER)!r})
import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""


def run(name: str, *words: str) -> str:
    done = subprocess.run([sys.executable, str(FOLDER / name), *words], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", FOLDER / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # over such small matrices two mostly wait for each other
    yield module
    torch.set_num_threads(threads)


def tiny(gpu: ModuleType, algorithm: str = "sft") -> Any:
    """One tiny smoke run's result."""
    torch.manual_seed(0)
    config = gpu.AutoConfig.for_model(**gpu.SHAPES["tiny"], tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    base = gpu.freeze(gpu.build_model(config, torch.device("cpu")), tokenizer=None, name="random", bits=4)
    return gpu.smoke(algorithm, base, gpu.Size(4, 2, 48))


def failed(result: Any) -> list[str]:
    return [name for name, held in result.checks.items() if not held]


EVERY = ["sft", "reward", "dpo", "ppo", "grpo"]


@pytest.mark.parametrize("algorithms, checkpointing", [
    (["grpo", "ppo"], "on"), pytest.param(EVERY, "both", marks=pytest.mark.slow)])  # fmt: skip
def test_smoke_needs_only_what_such_a_machine_has(tmp_path: Path, algorithms: list[str], checkpointing: str) -> None:
    file = tmp_path / "smoke.json"
    words = [sys.executable, "-c", BLOCKED, "smoke", *algorithms, "--tiny", "--checkpointing", checkpointing, "--json", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens a second" in done.stdout
    results = json.loads(file.read_text())["results"]
    each = 2 if checkpointing == "both" else 1
    assert [result["algorithm"] for result in results] == [name for name in algorithms for _ in range(each)]
    for result in results:
        assert len(result["checks"]) >= 11 and all(result["checks"].values())
        assert result["figures"]["layer forwards a pass"] == 1.0 + result["checkpointing"]
        assert result["figures"]["relative error of logits"] < 1e-5
        if result["algorithm"] in ("reward", "dpo"):
            assert "shared prompts change nothing" in result["checks"]
        if result["algorithm"] == "grpo":
            assert {"policy starts at the base (KL 0)", "sampler and policy agree", "no group is dead"} <= set(result["checks"])
        if result["algorithm"] == "ppo":
            assert {"policy starts at the base (KL 0)", "sampler and policy agree", "ratios begin at 1"} <= set(result["checks"])
        if result["algorithm"] in ("ppo", "grpo"):
            assert result["figures"]["sampler against policy, mean"] < 1e-5


def test_smoke_without_a_card_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["smoke"]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_smoke_finds_missing_recomputation(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Roles, "_checkpoint", lambda self: None)
    assert failed(tiny(gpu)) == ["layers were recomputed"]


def test_smoke_finds_a_changed_base(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiling(roles: Any, rows: Any) -> Any:
        def spoiled(step: int) -> Any:
            weight = next(p for name, p in roles.base.model.named_parameters() if "layers.0" in name and p.dtype == torch.uint8)
            weight.data[0] ^= int(step == 2)  # one bit, once
            return rows(step)

        return gpu.sft(roles, spoiled)

    monkeypatch.setitem(gpu.ALGORITHMS, "sft", spoiling)
    assert failed(tiny(gpu)) == ["base is unchanged"]


def test_smoke_finds_rounded_logits(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gpu.Head.logits
    monkeypatch.setattr(gpu.Head, "logits", lambda self, *arguments: exact(self, *arguments).bfloat16().float())
    assert failed(tiny(gpu)) == ["logits left the product in fp32"]


def test_smoke_finds_adapters_that_stay(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make = gpu.make_optimizer
    monkeypatch.setattr(gpu, "make_optimizer", lambda parameters, *rest: make(parameters[1:], *rest))
    assert failed(tiny(gpu)) == ["adapters moved"]


def test_smoke_finds_linears_that_are_not_quantised(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(linear: Any, dtype: torch.dtype, device: torch.device, generator: Any) -> Any:
        made = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device, dtype)
        return made.requires_grad_(False)

    monkeypatch.setattr(gpu, "quantised_linear", plain)
    assert failed(tiny(gpu)) == ["linears are 4-bit"]


def test_smoke_finds_a_wrong_reference(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that is not its reference at the start, in a single element; and stale log-probs in the cache."""

    def spoiling(roles: Any, rows: Any) -> Any:
        made = gpu.dpo(roles, rows)
        with torch.no_grad():
            next(p for name, p in roles.named_parameters("policy").items() if "lora_B" in name)[0, 0] = 1e-3
        return made

    def stale(roles: Any, rows: Any) -> Any:
        made = gpu.dpo(roles, rows)
        made.kit.rows(0).extra["reference"][0] += 0.01
        return made

    for maker, words in ((spoiling, "before the first step policy and reference"), (stale, "cached log-probs of the reference")):
        monkeypatch.setitem(gpu.ALGORITHMS, "dpo", maker)
        assert failed(tiny(gpu, "dpo")) == ["ran, with the right reference"]
        assert words in capsys.readouterr().err


def test_smoke_finds_a_sampler_that_lies(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(roles: Any, rows: Any) -> Any:
        made = gpu.grpo(roles, rows)
        draw = made.harvester.draw

        def drawn(*arguments: Any) -> Any:
            harvest = draw(*arguments)
            harvest.batch.extra["sampler"] = harvest.batch.extra["sampler"] - 1e-3
            return harvest

        made.harvester.draw = drawn
        return made

    monkeypatch.setitem(gpu.ALGORITHMS, "grpo", lying)
    assert failed(tiny(gpu, "grpo")) == ["sampler and policy agree"]


def test_smoke_finds_prompts_shared_wrongly(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = gpu.Roles._decode

    def moved(self: Any, ids: Any, mask: Any, positions: Any) -> Any:
        """Every token of a packed row stands one place further."""
        shift = positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any())
        return decode(self, ids, mask, positions + (positions > 9) if shift else positions)

    monkeypatch.setattr(gpu.Roles, "_decode", moved)
    monkeypatch.setattr(gpu.Roles, "_longest_shareable", 1 << 20)  # its own check would find this
    assert failed(tiny(gpu, "reward")) == ["shared prompts change nothing"]


def test_smoke_finds_a_head_that_is_lost(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    save = gpu.save_file
    monkeypatch.setattr(gpu, "save_file", lambda tensors, file: save(
        {name: torch.zeros_like(tensor) if name == gpu.HEAD_KEY else tensor for name, tensor in tensors.items()}, file))  # fmt: skip
    assert failed(tiny(gpu, "reward")) == ["saved and reloaded, it says the same"]


def test_the_true_shapes_have_their_sizes(gpu: ModuleType) -> None:
    for shape, billions in (("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62)):
        with torch.device("meta"):
            model = gpu.AutoModelForCausalLM.from_config(gpu.AutoConfig.for_model(**gpu.SHAPES[shape], tie_word_embeddings=False))
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)


def test_memory_is_capped_only_on_larger_cards(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction))
    for total, cap in ((80e9, 24e9), (16e9, None)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, total=total: argparse.Namespace(total_memory=total))
        assert gpu.cap_memory(torch.device("cuda"), 24.0) == (cap / 2**30 if cap else None)
    assert fractions == [pytest.approx(0.3)]


def test_startup() -> None:
    assert "lowrank-tune --help" in run("startup.py", "--quick")


@pytest.mark.slow
def test_verifiers() -> None:
    told = run("verifiers.py", "--count", "4", "--workers", "1")
    assert ("(median; 1 workers; 4 of 4 pass)" in told) != ("no sandbox" in told) and told.count("40 of 40 pass") == 2


def test_rollout() -> None:
    assert "greedy words equal for 100%" in run("rollout.py", "--tiny")


@pytest.mark.slow
def test_algorithms(tmp_path: Path) -> None:
    """All five run over one SFT adapter, a row each; what is there is not run again, and the picture has a curve of each."""
    words = ("algorithms.py", "--tiny", "--out", str(tmp_path / "out"))
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in run(*words).splitlines() if line.startswith("| ")}
    assert list(rows) == ["algorithm", "SFT", "Reward model", "DPO", "GRPO", "PPO"]
    assert [rows[name][0].strip() for name in ("SFT", "DPO", "GRPO", "PPO")] == ["base", "sft", "sft", "sft"]
    assert rows["SFT"][2] == rows["DPO"][1] == rows["GRPO"][1] == rows["PPO"][1], "they do not begin as what SFT left"
    assert [rows[name][8].strip() for name in ("DPO", "GRPO", "PPO")] == ["0", "32", "16"]
    figures = json.loads((tmp_path / "out" / "figures.json").read_bytes())
    assert all(figures[name]["kl"] > 0 for name in ("sft", "dpo", "grpo", "ppo")) and figures["reward"]["kl"] is None
    assert all(0 < figure["cpu"] and 0 < figure["wall"] and figure["steps"] == 2 for figure in figures.values())
    left = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    again = run(*words, "--picture", str(tmp_path / "curves.svg"))
    assert again.count("\n") == 7 and {file: file.read_bytes() for file in left} == left
    drawn = ElementTree.parse(tmp_path / "curves.svg").getroot()
    curves = [chart for chart in drawn.iter("{http://www.w3.org/2000/svg}svg") if chart.get("class") == "chart lin"]
    assert len(curves) == 5 and all(chart.find("{http://www.w3.org/2000/svg}path") is not None for chart in curves)


@pytest.mark.slow
def test_tokenise() -> None:
    assert "of the bare rate" in run("tokenise.py", "--quick")


@pytest.mark.slow
def test_logps_memory() -> None:
    assert "stays under" in run("logps_memory.py", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--quick"], ["--quick", "--nf4"], ["ours", "trl", "--repeats", "5"]])
def test_sft_curves_agree(words: list[str]) -> None:
    if "trl" in words:
        pytest.importorskip("trl")
    assert "equal to 1e-4" in run("sft.py", *words)


@pytest.mark.parametrize("names", [["ours", "hand"], pytest.param(["ours", "ours-apart", "hand", "hand-lean"], marks=pytest.mark.slow)])
def test_dpo_curves_agree(tmp_path: Path, names: list[str]) -> None:
    """Ours with and without sharing and both loops by hand do the same steps; every figure is there."""
    file = tmp_path / "dpo.json"
    assert "equal to 1e-5" in run("dpo.py", *names, "--tiny", "--json", str(file))
    records = json.loads(file.read_text())["without checkpointing"]
    assert list(records) == names
    for record in records.values():
        assert len(record["cpu"]) == len(record["wall"]) == 2 and min(record["cpu"] + record["wall"]) > 0
        assert len(record["losses"]) == 8 and record["losses"][0] == pytest.approx(0.693147, abs=1e-5)
        assert min(record["memory"].values()) > 0
    tensors = [records[name]["memory"]["tensors"] for name in names if name != "hand-lean"]
    assert tensors == sorted(tensors) and len(set(tensors)) == len(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["ours", "trl", "trl-compact"], ["ours", "hand", "trl", "--checkpointing", "on"]])
def test_dpo_curves_agree_with_trl(words: list[str]) -> None:
    pytest.importorskip("trl")
    assert "equal to 1e-5" in run("dpo.py", "--tiny", *words)


@pytest.mark.slow
@pytest.mark.parametrize("names, micro", [(["ours"], "32"), (["ours", "trl"], "8")])
def test_grpo(tmp_path: Path, names: list[str], micro: str) -> None:
    """All take their steps, with the time of each split up, and draw the same number of tokens (asserted in the benchmark)."""
    if "trl" in names:
        pytest.importorskip("trl")
    file = tmp_path / "grpo.json"
    assert "rollout" in run("grpo.py", *names, "--tiny", "--micro", micro, "--json", str(file))
    records = json.loads(file.read_text())
    assert list(records) == names
    for record in records.values():
        assert len(record["losses"]) == 6 and all(0 < reward < 1 for reward in record["losses"])
        assert len(record["cpu"]) == len(record["split"]) == 2
        for step, cpu in zip(record["split"], record["cpu"], strict=True):
            assert set(step) == {"rollout", "scoring", "update"} and min(step.values()) > 0
            assert sum(step.values()) == pytest.approx(cpu, rel=0.05, abs=0.01)
