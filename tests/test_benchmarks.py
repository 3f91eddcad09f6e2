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
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowrank_tune.model import memory
from lowrank_tune.model.heads import KEY
from lowrank_tune.model.logps import Head
from lowrank_tune.model.roles import Roles
from lowrank_tune.recipe import Recipe
from lowrank_tune.train import make_optimizer

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

MISSING_THERE = ("datasets", "pydantic", "trl", "pyarrow", "re2", "math_verify", "z3")
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
words = " ".join(sys.argv[1:]).split(" then ")
sys.exit(max(gpu.main(each.split()) for each in words))
"""


def run(name: str, *words: str) -> str:
    done = subprocess.run([sys.executable, str(FOLDER / name), *words], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        module = importlib.import_module("gpu")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # over such small matrices two mostly wait for each other
        yield module
        torch.set_num_threads(threads)


def part(name: str) -> ModuleType:
    """A module of `benchmarks/card/`; `gpu` has made it importable."""
    return importlib.import_module(f"card.{name}")


def tiny_base(bf16: bool = False) -> Any:
    torch.manual_seed(0)
    return part("base").random_base("tiny", torch.device("cpu"), bf16)


def tiny(gpu: ModuleType, algorithm: str = "sft") -> Any:
    """One tiny smoke run's result."""
    return part("smoke").smoke(algorithm, tiny_base(), part("made").Size(4, 2, 48))


def failed(result: Any) -> list[str]:
    return [name for name, held in result.checks.items() if not held]


EVERY = ["sft", "reward", "dpo", "ppo", "grpo"]


@pytest.mark.parametrize("algorithms, checkpointing", [
    (["grpo", "ppo"], "on"), pytest.param([*EVERY, "memory"], "off", marks=pytest.mark.slow)])  # fmt: skip
def test_it_needs_only_what_such_a_machine_has(gpu: ModuleType, tmp_path: Path, algorithms: list[str], checkpointing: str) -> None:
    file = tmp_path / "card.jsonl"
    cells = [name for name in algorithms if name != "memory"]
    words = ["smoke", *algorithms, "--checkpointing", checkpointing, "--tiny", "--json", str(file), "then",
             "cells", *cells, "--tiny", "--json", str(file)]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = part("tables").read(str(file))
    check_smoke([record for record in records if record["kind"] == "smoke"], algorithms)
    measured = [record for record in records if record["kind"] == "cell"]
    assert {record["algorithm"] for record in measured} == set(cells)
    for record in measured:
        assert record["loss is finite"] and record["planned GiB"] is None
        assert 0 < record["share of roof"] < 1 and record["update tokens/s"] > 0
        assert ("rollout tokens/s" in record) == (record["algorithm"] in ("grpo", "ppo"))
    table = part("tables").markdown(records)
    assert "| ppo 2x24 |  | 0." in table and f"| grpo | {'on' if checkpointing == 'on' else 'off'} | 16 of 16 |" in table


def check_smoke(results: list[dict[str, Any]], algorithms: list[str]) -> None:
    assert [result["algorithm"] for result in results] == algorithms
    for result in results:
        assert all(result["checks"].values())
        if result["algorithm"] == "memory":
            continue
        assert len(result["checks"]) >= 11 and result["figures"]["layer forwards a pass"] == 1.0 + result["checkpointing"]
        assert result["figures"]["relative error of logits"] < 1e-5
        if result["algorithm"] in ("reward", "dpo"):
            assert "shared prompts change nothing" in result["checks"]
        if result["algorithm"] == "grpo":
            assert {"policy starts at the base (KL 0)", "sampler and policy agree", "no group is dead"} <= set(result["checks"])
        if result["algorithm"] == "ppo":
            assert {"policy starts at the base (KL 0)", "sampler and policy agree", "ratios begin at 1"} <= set(result["checks"])
        if result["algorithm"] in ("ppo", "grpo"):
            assert result["figures"]["sampler against policy, mean"] < 1e-5


@pytest.mark.slow
def test_the_whole_proof(tmp_path: Path) -> None:
    """Its parts are processes of their own; what it says at the end counts all of them."""
    file = tmp_path / "proof.jsonl"
    words = [sys.executable, str(FOLDER / "gpu.py"), "proof", "--tiny", "--json", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 0 and "every check held" in done.stdout, done.stdout + done.stderr
    records = [json.loads(line) for line in file.read_text().splitlines()]
    check_smoke([record for record in records if record["kind"] == "smoke"], [*(name for name in EVERY for _ in range(2)), "memory"])
    cells = [record for record in records if record["kind"] == "cell"]
    ours, theirs = ([record for record in cells if (record.get("side") == "TRL") == side] for side in (False, True))
    assert {record["algorithm"] for record in ours} == set(EVERY) and not any("failed" in record for record in cells)
    if all(importlib.util.find_spec(name) for name in ("trl", "datasets")):
        assert [record["algorithm"] for record in theirs] == ["sft", "dpo", "grpo"]
        assert all(record["seconds a step"] > 0 and record["cell"] in {one["cell"] for one in ours} for record in theirs)


def test_smoke_without_a_card_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("smoke", "cells"):
        with pytest.raises(SystemExit, match="2"):
            gpu.main([command])
        assert "--tiny" in capsys.readouterr().err
    assert gpu.main([]) == 2 and "--tiny" in capsys.readouterr().err
    assert gpu.main(["smoke", "sftt", "--tiny"]) == 2 and "no algorithm sftt" in capsys.readouterr().err


def test_smoke_finds_missing_recomputation(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roles, "_checkpoint", lambda self, wanted, offload: None)
    assert failed(tiny(gpu)) == ["layers were recomputed"]


def test_smoke_finds_a_changed_base(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiling(roles: Any, rows: Any, size: Any) -> Any:
        def spoiled(step: int) -> Any:
            weight = next(p for name, p in roles.base.model.named_parameters() if "layers.0" in name and p.dtype == torch.uint8)
            weight.data[0] ^= int(step == 2)  # one bit, once
            return rows(step)

        return part("makers").sft(roles, spoiled, size)

    monkeypatch.setitem(part("makers").ALGORITHMS, "sft", spoiling)
    assert failed(tiny(gpu)) == ["base is unchanged"]


def test_smoke_finds_rounded_logits(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, *arguments: exact(self, *arguments).bfloat16().float())
    assert failed(tiny(gpu)) == ["logits left the product in fp32"]


def test_smoke_finds_adapters_that_stay(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make = make_optimizer
    monkeypatch.setattr(part("course"), "make_optimizer", lambda parameters, *rest: make(parameters[1:], *rest))
    assert failed(tiny(gpu)) == ["adapters moved"]


def test_smoke_finds_linears_that_are_not_quantised(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(linear: Any, dtype: torch.dtype, device: torch.device, generator: Any) -> Any:
        made = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device, dtype)
        return made.requires_grad_(False)

    monkeypatch.setattr(part("base"), "quantised_linear", plain)
    assert failed(tiny(gpu)) == ["linears are 4-bit"]


def test_smoke_finds_a_wrong_reference(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that is not its reference at the start, in a single element; and stale log-probs in the cache."""

    def spoiling(roles: Any, rows: Any, size: Any) -> Any:
        made = part("makers").dpo(roles, rows, size)
        with torch.no_grad():
            next(p for name, p in roles.named_parameters("policy").items() if "lora_B" in name)[0, 0] = 1e-3
        return made

    def stale(roles: Any, rows: Any, size: Any) -> Any:
        made = part("makers").dpo(roles, rows, size)
        made.kit.rows(0).extra["reference"][0] += 0.01
        return made

    for maker, words in ((spoiling, "before the first step policy and reference"), (stale, "cached log-probs of the reference")):
        monkeypatch.setitem(part("makers").ALGORITHMS, "dpo", maker)
        assert failed(tiny(gpu, "dpo")) == ["ran, with the right reference"]
        assert words in capsys.readouterr().err


def test_smoke_finds_a_sampler_that_lies(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(roles: Any, rows: Any, size: Any) -> Any:
        made = part("makers").grpo(roles, rows, size)
        draw = made.harvester.draw

        def drawn(*arguments: Any) -> Any:
            harvest = draw(*arguments)
            harvest.batch.extra["sampler"] = harvest.batch.extra["sampler"] - 1e-3
            return harvest

        made.harvester.draw = drawn
        return made

    monkeypatch.setitem(part("makers").ALGORITHMS, "grpo", lying)
    assert failed(tiny(gpu, "grpo")) == ["sampler and policy agree"]


def test_smoke_finds_prompts_shared_wrongly(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Roles._decode

    def moved(self: Any, ids: Any, mask: Any, positions: Any) -> Any:
        """Every token of a packed row stands one place further."""
        shift = positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any())
        return decode(self, ids, mask, positions + (positions > 9) if shift else positions)

    monkeypatch.setattr(Roles, "_decode", moved)
    monkeypatch.setattr(Roles, "_longest_shareable", 1 << 20)  # its own check would find this
    assert failed(tiny(gpu, "reward")) == ["shared prompts change nothing"]


def test_smoke_finds_a_head_that_is_lost(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    save = save_file
    monkeypatch.setattr(part("smoke"), "save_file", lambda tensors, file: save(
        {name: torch.zeros_like(tensor) if name == KEY else tensor for name, tensor in tensors.items()}, file))  # fmt: skip
    assert failed(tiny(gpu, "reward")) == ["saved and reloaded, it says the same"]


def test_the_true_shapes_have_their_sizes(gpu: ModuleType) -> None:
    for shape, billions in (("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62), ("qwen3-8b", 8.19), ("mistral-7b", 7.25)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(part("base").config_of(shape))
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(billions * 1e9, rel=2e-3)


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "mistral-7b"])
def test_a_base_is_built_as_transformers_builds_one(gpu: ModuleType, shape: str) -> None:
    """The same kinds of module in the same places, rotary frequencies and all, of every family; at a small size."""
    config = part("base").config_of(shape)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 97, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 16})  # fmt: skip
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    made = part("base").build_model(config, torch.device("cpu"), torch.bfloat16)
    usual = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {name: buffer.tolist() for name, buffer in made.named_buffers()} == {name: buffer.tolist() for name, buffer in usual.named_buffers()}
    for (name, mine), (other, theirs) in zip(made.named_modules(), usual.named_modules(), strict=True):
        assert name == other and isinstance(mine, type(theirs))
        if isinstance(mine, torch.nn.Linear) and "lm_head" not in name:
            weight = dequantize_4bit(mine.weight.data, mine.weight.quant_state)
            assert weight.shape == theirs.weight.shape and weight.dtype == torch.bfloat16 and 0.01 < float(weight.float().std()) < 0.03
    assert torch.isfinite(made(input_ids=torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("algorithm", ["sft", "grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "dpo", "ppo"))])
def test_smoke_holds_in_a_cards_arithmetic(gpu: ModuleType, algorithm: str) -> None:
    """bf16 weights under bf16 autocast, which the CPU can do too."""
    base = tiny_base(bf16=True)
    result = part("smoke").smoke(algorithm, base, part("made").Size(4, 2, 48))
    assert base.model.dtype == torch.bfloat16 and failed(result) == []
    if algorithm == "grpo":
        assert 1e-5 < result.figures["sampler against policy, mean"] < 0.05, "it was fp32 after all"


def test_every_way_to_save_memory_gives_the_same_gradient(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    result = part("features").features(tiny_base(), part("made").Size(4, 2, 48))
    assert failed(result) == [] and sum("the same gradient" in name for name in result.checks) == 4
    assert result.figures["times that memory ran short"] >= 1 and "adamw_8bit moves all adapters" in result.checks
    monkeypatch.setattr(memory, "_offloaded", lambda checkpoint, *given, **named: 1.01 * checkpoint(*given, **named))
    assert failed(part("features").features(tiny_base(), part("made").Size(4, 2, 48))) == ["the same gradient, all, inputs offloaded"]


def test_what_does_not_fit_is_told(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that runs out of memory, and the next one on the same base."""
    cells, base = part("cells"), tiny_base()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    with monkeypatch.context() as patch:
        patch.setattr(part("course").Loop, "run", full)
        record = cells.measure(cells.TINY_CELLS[0], base, (1.0, 1.0), 20.0)
    assert record["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB." and record["planned GiB"] == 20.0
    fits = cells.measure(cells.TINY_CELLS[0], base, (1.0, 1.0), 2.0)
    assert fits["the plan is within 5 %"] is (abs(fits["measured GiB"] / 2.0 - 1) <= 0.05)
    fits["measured GiB"] = 2.1
    table = part("tables").cell_table([record, fits, {"cell": fits["cell"], "side": "TRL", "failed": "out of memory: CUDA"}])
    assert "| sft 2x48 | 20.00 | OutOfMemoryError: CUDA out" in table and "| 2.00 | 2.10 | +5.0% |" in table and "| out of memory |" in table


def test_every_cell_is_a_recipe(gpu: ModuleType, tmp_path: Path) -> None:
    """With the sizes that are measured; and what was planned elsewhere finds its cell."""
    cells, planned = part("cells").CELLS, part("planned")
    for cell in cells:
        recipe = Recipe.from_dict(planned.recipe_of(cell, "qwen2.5-7b"))
        assert recipe.train.micro_batch_size == cell.micro and recipe.train.optimizer == cell.optimizer
        if cell.algorithm in ("grpo", "ppo"):
            assert recipe.data.max_prompt_length + recipe.rollout.max_new_tokens == cell.length
            assert recipe.train.prompts_per_step * recipe.rollout.num_generations == cell.units
        else:
            assert (recipe.data.max_length, recipe.train.rows_per_step) == (cell.length, cell.units)
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"shape": "qwen2.5-7b", "planned GiB": {cells[0].name: 12.5}}))
    assert planned.plans("qwen2.5-7b", str(file)) == {"sft 4x2048": 12.5} and planned.plans("qwen2.5-7b", None) == {}
    with pytest.raises(SystemExit, match="holds plans for qwen2.5-7b, not for qwen3-8b"):
        planned.plans("qwen3-8b", str(file))


@pytest.mark.slow
def test_every_cell_is_planned(gpu: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    run("gpu.py", "plan", "--shape", "llama-3.1-8b", "--out", str(file))
    found = part("planned").plans("llama-3.1-8b", str(file))
    assert list(found) == [cell.name for cell in part("cells").CELLS] and all(5.5 < gib < 22 for gib in found.values())
    assert found["sft 1x1024 recompute none"] > found["sft 4x2048"] > found["sft 2x4096 offloaded paged_adamw_8bit"]


def test_memory_is_capped_only_on_larger_cards(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction))
    for total, cap in ((80e9, 24e9), (16e9, None)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, total=total: argparse.Namespace(total_memory=total))
        assert part("machine").cap_memory(torch.device("cuda"), 24.0) == (cap / 2**30 if cap else None)
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
def test_data_scale(tmp_path: Path) -> None:
    told = run("data_scale.py", "--rows", "400", "--folder", str(tmp_path))
    assert told.count("loaded") == 2 and "fit to train on" in told and "meta" in told.lower() and "403,406,096 expected" in told
    first, second = told.split("second start")
    assert "rows read" in first and "rows read" not in second, "the second start tokenised again"


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
