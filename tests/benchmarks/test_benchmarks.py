"""The benchmarks run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
from require_fake_gpu import require_fake_gpu

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *words], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_startup() -> None:
    assert "lowrank-tune --help" in run("startup.py", "--quick")


@pytest.mark.slow
def test_verifiers() -> None:
    output = run("verifiers.py", "--count", "4", "--workers", "1")
    assert ("(median; 1 workers; 4 of 4 pass)" in output) != ("no sandbox" in output) and output.count(
        "40 of 40 pass"
    ) == 2


@pytest.mark.slow
def test_half_precision() -> None:
    rows = run("half_precision.py", "--tiny", "--seeds", "1").splitlines()
    assert [row.split("|")[1:3] for row in rows[2:]] == [
        [f" {stage} ", f" {dtype} "] for stage in ("SFT", "GRPO") for dtype in ("bfloat16", "float16")
    ]


@pytest.mark.slow
def test_kernel_counts(tmp_path: Path) -> None:
    """The counts of one layer: recomputation and a second adapter add launches, shared prompts save bytes."""
    require_fake_gpu()
    file = tmp_path / "counts.json"
    output = run("kernel_counts.py", "--layers", "1", "--places", "--json", str(file))
    assert output.startswith("Counted, not measured") and "host_syncs 1 x lowrank_tune/" in output
    counts = json.loads(file.read_bytes())
    micro = list(counts["micro"].values())
    assert micro[0]["launches"] > micro[1]["launches"]
    for whole, shared in (micro[2:4], micro[4:6]):
        assert sum(shared["bytes_by_kind"].values()) < sum(whole["bytes_by_kind"].values())
    decode = counts["decode"]
    one, two = "rollout, 16 at once", "rollout, 16 at once, adapters [sft, policy]"
    few, plain = decode[one], decode[f"{one}, plain modules"]
    assert decode[f"{two}, plain modules"]["launches"] > plain["launches"] > few["launches"]
    assert decode[two]["launches"] == few["launches"]
    assert few["gpu_seconds"] < plain["gpu_seconds"]
    assert 3 * few["replayed_calls"] < few["python_calls"] < plain["python_calls"]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "layers"), [("tiny-sft", 4), ("qwen2.5-7b-sft", 28)])
def test_compiled_counts(preset: str, layers: int) -> None:
    """Compiled layers start fewer kernels, read and write less, and are faster."""
    lines = run("compiled_counts.py", "--preset", preset, "--quick").splitlines()
    plain, compiled = [[cell.strip().replace(",", "") for cell in line.split("|")] for line in lines[-2:]]
    assert f"all recomputed: {layers} of {layers} 1 x 2048" in compiled[1]
    assert int(compiled[2]) < int(plain[2]) and int(compiled[-2]) > int(plain[-2])
    assert float(compiled[4]) < float(plain[4])


@pytest.mark.slow
def test_compiled_counts_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    counts = import_module("compiled_counts")
    case = counts.Case("both", True, True, 1, None)
    line = counts.row(counts.spec_of("tiny-sft", case), case, replace(counts.gpu_named("4090"), memory_gib=0.5))
    assert line.startswith("| both: 1 x 2,048 | does not fit |") and line.count("|") == counts.HEADER.count("|")


@pytest.mark.slow
def test_rollout() -> None:
    assert "greedy words equal for 100%" in run("rollout.py", "--tiny")


@pytest.mark.slow
def test_algorithms(tmp_path: Path) -> None:
    """All five run over one SFT adapter, a row each; what is there is not run again, and the picture has a curve of
    each."""
    words = ("algorithms.py", "--tiny", "--out", str(tmp_path / "out"))
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1] for line in run(*words).splitlines() if line.startswith("| ")
    }
    assert list(rows) == ["algorithm", "SFT", "Reward model", "DPO", "GRPO", "PPO"]
    assert [rows[name][0].strip() for name in ("SFT", "DPO", "GRPO", "PPO")] == ["base", "sft", "sft", "sft"]
    assert rows["SFT"][2] == rows["DPO"][1] == rows["GRPO"][1] == rows["PPO"][1], "they do not begin as what SFT left"
    assert [rows[name][8].strip() for name in ("DPO", "GRPO", "PPO")] == ["0", "32", "16"]
    figures = json.loads((tmp_path / "out" / "figures.json").read_bytes())
    assert all(figures[name]["kl"] > 0 for name in ("sft", "dpo", "grpo", "ppo")) and figures["reward"]["kl"] is None
    assert all(figure["cpu"] > 0 and figure["wall"] > 0 and figure["steps"] == 2 for figure in figures.values())
    left = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    again = run(*words, "--picture", str(tmp_path / "curves.svg"))
    assert again.count("\n") == 7 and {file: file.read_bytes() for file in left} == left
    drawn = ElementTree.parse(tmp_path / "curves.svg").getroot()
    curves = [chart for chart in drawn.iter("{http://www.w3.org/2000/svg}svg") if chart.get("class") == "chart lin"]
    assert len(curves) == 5 and all(chart.find("{http://www.w3.org/2000/svg}path") is not None for chart in curves)


@pytest.mark.slow
def test_tokenize() -> None:
    assert "of the bare rate" in run("tokenize_rows.py", "--quick")


@pytest.mark.slow
def test_data_scale(tmp_path: Path) -> None:
    output = run("data_scale.py", "--rows", "400", "--folder", str(tmp_path))
    assert (
        output.count("loaded") == 2
        and "fit to train on" in output
        and "meta" in output.lower()
        and "403,406,096 expected" in output
    )
    first, second = output.split("second start")
    assert "rows read" in first and "rows read" not in second, "the second start tokenized again"


@pytest.mark.slow
def test_logps_memory() -> None:
    assert "stays under" in run("logps_memory.py", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--quick"], ["--quick", "--nf4"], ["ours", "trl", "--repeats", "5"]])
def test_sft_curves_agree(words: list[str]) -> None:
    if "trl" in words:
        pytest.importorskip("trl")
    assert "equal to 1e-4" in run("sft.py", *words)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["ours", "hand"], ["ours", "ours-apart", "hand", "hand-lean"]])
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
    """All take their steps, with the time of each split up, and draw the same number of tokens (asserted in the
    benchmark)."""
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
