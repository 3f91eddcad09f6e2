"""What leaves a run is what was trained: merged models and adapters, read back, against the run; and planted faults
that must be caught."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from export_fixtures import IDS, FinishedRun, kl, make_run
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from lowrank_tune import UserError
from lowrank_tune.cli import app
from lowrank_tune.config import BaseConfig
from lowrank_tune.errors import TrainingError
from lowrank_tune.export import MergeReport, merge
from lowrank_tune.export.merge import _shards, merged_weight
from lowrank_tune.export.merge_check import NEAR_TIE, RecordedOutputs, _greedy_difference, compare_models

CHILD = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
four = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
ids, orders, out = json.loads(sys.argv[1])
outputs = {}
for name, base, adapter, bits in orders:
    more = {"quantization_config": four} if bits == 4 else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **more)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    with torch.no_grad():
        outputs[name] = model(input_ids=torch.tensor(ids)).logits[0].float().contiguous()
save_file(outputs, out)
"""


def quiet(event: object) -> None:
    pass


def merged(made: FinishedRun, out: Path, base: Any = "dequantized", **more: Any) -> MergeReport:
    return merge(made.run, out, base, quiet, quiet, torch.device("cpu"), **more).report


def read_back(folder: Path) -> torch.Tensor:
    """What plain transformers makes of a merged model, (T, V)."""
    with torch.no_grad():
        return torch.as_tensor(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits[0]
        )


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("untied"), "llama", tied=False, lower=("sft",), rslora=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("tied"), "qwen2", tied=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_merged_is_what_was_trained_in_several_shards(untied: FinishedRun, tmp_path: Path) -> None:
    proof = merged(untied, tmp_path / "out", shard=60_000)
    assert kl(untied.logits, read_back(tmp_path / "out")) < 1e-3 and proof.kl < 1e-3 and proof.parted == 0
    assert (
        proof.same + proof.near_ties == proof.prompts
        and proof.rows > 0
        and abs(proof.trained_loss - proof.merged_loss) < 0.01
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3 and "lm_head.weight" in index["weight_map"]
    tensors = [tensor for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors) and {
        t.dtype for t in tensors
    } == {torch.bfloat16}
    for file in (tmp_path / "out").glob("*.safetensors"):
        shard = load_file(file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 60_000, file.name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 6]
    assert "KL(trained" in (tmp_path / "out" / "README.md").read_text()
    for file in (tmp_path / "out").iterdir():
        assert str(untied.run).encode() not in file.read_bytes() and b"somebody" not in file.read_bytes(), file


def test_each_weight_is_rounded_once(untied: FinishedRun, tmp_path: Path) -> None:
    merged(untied, tmp_path / "out")
    found, lora = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(untied.run / "final" / "adapter_model.safetensors"),
    )
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(untied.base, dtype=torch.float32, quantization_config=four)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        packed = base.get_submodule(name).weight
        a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        exact = dequantize_4bit(packed.data, packed.quant_state).double() + b @ a  # the folded adapter's scale is 1
        assert (found[f"{name}.weight"] == exact.to(torch.bfloat16)).float().mean() > 0.999, name


def test_several_adapters_are_added_before_the_one_cast() -> None:
    """bf16 has 8 binary digits: 256 + 1 is a tie that goes back to 256, however often it is added one by one."""
    ones = {"layer": (torch.ones(1, 4), torch.ones(3, 1))}
    found = merged_weight("layer.weight", torch.full((3, 4), 256.0, dtype=torch.bfloat16), [ones, ones])
    assert found.dtype == torch.bfloat16 and (found == 258.0).all()
    stream = torch.Generator().manual_seed(0)
    weight, *factors = (
        torch.randn(shape, generator=stream) for shape in ((64, 48), (4, 48), (64, 4), (7, 48), (64, 7))
    )
    deltas = [
        {"layer": (factors[0], factors[1])},
        {"other": (factors[0], factors[1])},
        {"layer": (factors[2], factors[3])},
    ]
    exact = weight.double() + factors[1].double() @ factors[0].double() + factors[3].double() @ factors[2].double()
    once = merged_weight("layer.weight", weight, deltas) == exact.to(torch.bfloat16)
    assert once.float().mean() > 0.999


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    limit=st.integers(1, 120),
)
def test_shards_hold_all_tensors_in_order_and_stay_within_the_limit(sizes: list[int], limit: int) -> None:
    shapes = {str(number): (torch.Size((size,)), True) for number, size in enumerate(sizes)}
    shards = list(_shards(shapes, limit))
    assert [name for shard in shards for name in shard] == list(shapes)
    num_bytes = [sum(2 * sizes[int(name)] for name in shard) for shard in shards]
    assert all(len(shard) == 1 or size <= limit for shard, size in zip(shards, num_bytes, strict=True))
    for size, following in zip(num_bytes, shards[1:], strict=False):
        assert size + 2 * sizes[int(following[0])] > limit, "the next tensor had room"


def test_a_tied_head_stays_tied_and_the_original_weights_are_another_model(tied: FinishedRun, tmp_path: Path) -> None:
    proof = merged(tied, tmp_path / "dequantized")
    assert proof.kl < 1e-3 and kl(tied.logits, read_back(tmp_path / "dequantized")) < 1e-3
    names = load_file(tmp_path / "dequantized" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    other = merged(tied, tmp_path / "original", "original")
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tied.base, dtype=torch.float32)
        oracle = PeftModel.from_pretrained(whole, tied.run / "final").eval()(input_ids=IDS).logits[0]
    assert kl(oracle, read_back(tmp_path / "original")) < 1e-3, "the original weights with the adapter"
    assert other.kl > 1e-2 > 1e-3 > proof.kl


def swap_end(real: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *arguments: real(*arguments) | {"eos_token_id": [2, 7]}


def drop_head(real: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda base: {name: facts for name, facts in real(base).items() if name != "lm_head.weight"}


def lose_adapter(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda name, weight, deltas: real(name, weight, [])


@pytest.mark.parametrize(
    ("where", "fault", "sentence"),
    [
        ("dequantize", None, "KL.trained .. merged. is"),
        ("merged_tensor_shapes", drop_head, "cannot be read back.*lm_head"),
        ("generation_config", swap_end, "its answers end at other tokens"),
        ("merged_weight", lose_adapter, "KL.trained .. merged. is"),
    ],
)
def test_a_planted_wrong_merge_is_caught(
    untied: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fault: Any, sentence: str
) -> None:
    module = sys.modules["lowrank_tune.export.merge"]
    if fault is None:  # original weights where dequantized ones were claimed
        found = module.load_finished_run(untied.run)  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "dequantize", lambda base: module.original_weights(found, base))  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(module, where, fault(getattr(module, where)))
    with pytest.raises(TrainingError, match=sentence):
        merged(untied, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_full_disk_leaves_no_file(
    untied: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    written = list[Path]()

    def filling(tensors: Any, file: Path, **more: Any) -> None:
        written.append(file)
        if len(written) == 2:
            raise error
        save_file(tensors, file, **more)

    monkeypatch.setattr(sys.modules["lowrank_tune.export.merge"], "save_file", filling)
    with pytest.raises(
        TrainingError, match="the disk is full: .* are needed, .* are free on the disk of .* with --out"
    ):
        merged(untied, tmp_path / "out", shard=60_000)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def copy_of(made: FinishedRun, place: Path) -> Path:
    shutil.copytree(made.run, place)
    return place


def test_what_cannot_be_merged_fails_with_one_sentence(
    untied: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(run: Path, *more: str) -> str:
        done = CliRunner().invoke(app, ["merge", str(run), *more])
        assert done.exit_code == 2 and done.output.count("\n") == 1, done.output
        return done.output

    assert "there is no such run" in error_of(tmp_path / "nowhere")
    assert "is not a run: it contains no readable run.json" in error_of(tmp_path)
    (tmp_path / "there").mkdir()
    assert "exists; give another folder with --out" in error_of(untied.run, "--out", str(tmp_path / "there"))
    unfinished = copy_of(untied, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "final")
    assert "has not ended" in error_of(unfinished)
    changed = copy_of(untied, tmp_path / "changed")
    facts = json.loads((changed / "base.json").read_text())
    facts["tensors"]["model.layers.1.mlp.up_proj.weight"] = "0" * 32
    (changed / "base.json").write_text(json.dumps(facts))
    assert re.search(r": 1 of its \d\d tensors differ, among them model.layers.1.mlp.up_proj.weight", error_of(changed))
    gone = copy_of(untied, tmp_path / "gone")
    facts = json.loads((gone / "run.json").read_text())
    facts["recipe"]["base"]["model"] = str(tmp_path / "no-base")
    (gone / "run.json").write_text(json.dumps(facts))
    assert "there is no folder" in error_of(gone)
    older = copy_of(untied, tmp_path / "older")
    (older / "final" / "stack.json").unlink()
    assert "contains the adapter policy without sft, which it was trained over" in error_of(older)
    reward = copy_of(untied, tmp_path / "reward")
    facts["recipe"]["algorithm"] = "reward"
    (reward / "run.json").write_text(json.dumps(facts))
    assert "trained a reward model" in error_of(reward)
    module = sys.modules["lowrank_tune.export.merge_check"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "device_memory", lambda device: 1 << 29)
        assert "must be read back to be compared, which needs 1 GiB of memory" in error_of(untied.run)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=1, used=1, free=0))
    assert "GiB are free there" in error_of(untied.run)
    assert not list(untied.run.glob("*merged*")) and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    ("module", "tie", "sentence"),
    [
        ("lm_head", True, "one of them changes the output head"),
        ("model.embed_tokens", False, "changes the embedding .*lora_embedding_A"),
    ],
)
def test_adapters_on_head_or_embedding_are_refused(
    untied: FinishedRun, tied: FinishedRun, tmp_path: Path, module: str, tie: bool, sentence: str
) -> None:
    made = tied if tie else untied
    final = copy_of(made, tmp_path / "run") / "final"
    (final / "manifest.json").unlink()  # the change is meant
    config = json.loads((final / "adapter_config.json").read_text())
    vocabulary, width = load_file(made.base / "model.safetensors")["model.embed_tokens.weight"].shape
    names = ("lora_A.weight", "lora_B.weight") if tie else ("lora_embedding_A", "lora_embedding_B")
    into, out = (width, vocabulary) if tie else (vocabulary, width)
    added = {
        f"base_model.model.{module}.{names[0]}": torch.zeros(config["r"], into),
        f"base_model.model.{module}.{names[1]}": torch.zeros(out, config["r"]),
    }
    save_file(load_file(final / "adapter_model.safetensors") | added, final / "adapter_model.safetensors")
    (final / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": [*config["target_modules"], module.rpartition(".")[2]]})
    )
    with pytest.raises(UserError, match=sentence):
        merged(FinishedRun(final.parent, made.base, made.logits), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_kept_apart_is_merged_whole(tmp_path: Path) -> None:
    made = make_run(tmp_path, "llama", lower=("sft",), stack="separate")
    assert (
        not json.loads((made.run / "final" / "stack.json").read_text())["combined"]
        and (made.run / "final" / "sft").is_dir()
    )
    merged(made, tmp_path / "out")
    assert kl(made.logits, read_back(tmp_path / "out")) < 1e-3


def test_the_reported_kl_is_that_of_the_trained_model(untied: FinishedRun) -> None:
    """KL(trained || merged) of logits far apart, where the other direction is another number."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(untied.base, dtype=torch.float32).eval()
        merged_logits = model(input_ids=IDS).logits[0, :-1]
    noise = torch.randn(merged_logits.shape, generator=torch.Generator().manual_seed(4))
    noise[:6] *= 0.1
    trained = merged_logits + 2 * noise
    recorded = RecordedOutputs([IDS[0].tolist()], [1], [trained], [], math.nan, "a text")
    report = compare_models(untied.base, recorded, frozenset({2}), (torch.device("cpu"), torch.float32), quiet)
    worst = max(kl(trained[place, None], merged_logits[place, None]) for place in range(len(trained)))
    assert report.kl == pytest.approx(kl(trained, merged_logits), rel=1e-4)
    assert report.worst_kl == pytest.approx(worst, rel=1e-4)
    assert abs(kl(merged_logits, trained) / kl(trained, merged_logits) - 1) > 0.05, "the directions can be told apart"


@pytest.mark.parametrize("likeliest", [20.0, 100.0, -20.0])
def test_two_steps_of_bf16_are_a_near_tie_and_no_more(likeliest: float) -> None:
    """The step is the distance of two neighbors in bf16 at the size of the logits, as torch has it."""
    size = torch.tensor(abs(likeliest), dtype=torch.bfloat16)
    step = float(torch.nextafter(size, torch.tensor(math.inf, dtype=torch.bfloat16)) - size)
    assert 2 * step > NEAR_TIE
    for gap, outcome in ((1.9 * step, "near-tie"), (2.1 * step, "parted")):
        trained = torch.tensor([[0.0, 9.0, 1.0], [likeliest, likeliest - gap, likeliest - 50.0]])
        merged_logits = trained.clone()
        merged_logits[1] = torch.tensor([0.0, 1.0, -1.0])
        assert _greedy_difference(trained, merged_logits, torch.tensor([1, 0])) == outcome
        assert _greedy_difference(trained, trained, torch.tensor([1, 0])) == "same"


def test_report_lists_every_difference_above_its_limit() -> None:
    good = MergeReport(50, 2000, 9e-4, 0.09, 0.2, 45, 3, 2, 1.0, 1.0, 50, True, "rows")
    assert good.faults(True) == []
    for change, sentence in (
        ({"kl": 1.1e-3}, "above 0.001"),
        ({"kl": math.nan}, "not finite"),
        ({"worst_kl": 0.3}, "at one token"),
        ({"worst_kl": math.nan}, "at one token"),
        ({"parted": 3}, "no near-tie"),
        ({"ends_agree": False}, "end at other"),
    ):
        assert sentence in "; ".join(replace(good, **change).faults(True)), change
    assert replace(good, kl=0.2, worst_kl=5.0, parted=40).faults(False) == [] and replace(
        good, ends_agree=False
    ).faults(False)


def test_a_gpu_too_small_for_16_bits_is_reported_and_the_cpu_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module, events = sys.modules["lowrank_tune.export.merge_check"], list[Any]()
    monkeypatch.setattr(module, "device_memory", lambda device: (24 if device.type == "cuda" else 64) << 30)
    place = module.readback_device  # type: ignore[attr-defined]
    cuda, half, full = torch.device("cuda"), BaseConfig(dtype="float16"), BaseConfig(dtype="float32")
    assert place(8 << 30, half, cuda, events.append) == (cuda, torch.float16) and not events
    assert place(3 << 30, full, cuda, events.append) == (cuda, torch.float32) and not events
    assert place(14 << 30, half, cuda, events.append) == (torch.device("cpu"), torch.bfloat16)
    assert "needs 29 GiB and the GPU has 24: it is compared on the CPU" in events[0].message
    with pytest.raises(UserError, match="needs 141 GiB of memory, and this machine has 64"):
        place(70 << 30, half, cuda, events.append)


@pytest.mark.slow
def test_round_trips_in_a_new_process(tmp_path: Path) -> None:
    """Adapter, folded stack, and merged into both bases; tied and untied, of four families."""
    orders, runs = list[tuple[str, str, str, int]](), dict[str, FinishedRun]()
    for kind in ("llama", "qwen2", "mistral", "gemma2"):
        for tie in (False, True):
            name = f"{kind} {tie}"
            place = tmp_path / name.replace(" ", "-")
            made = runs[name] = make_run(place, kind, tie, lower=("sft",), rslora=tie)
            alone = runs[f"{name} alone"] = make_run(place / "alone", kind, tie, rslora=not tie)
            proof = merged(made, place / "dequantized")
            assert proof.kl <= 1e-3 and proof.parted == 0 and proof.prompts == 50, (name, proof)
            print(f"{name}: {proof.table()}")
            merged(made, place / "original", "original")
            final = str(made.run / "final")
            orders += [
                (f"{name} folded", str(made.base), final, 4),
                (f"{name} oracle", str(made.base), final, 16),
                *((f"{name} {taken}", str(place / taken), "", 16) for taken in ("dequantized", "original")),
                (f"{name} alone", str(alone.base), str(alone.run / "final"), 4),
            ]
    wanted = json.dumps([IDS.tolist(), orders, str(tmp_path / "outputs")])
    done = subprocess.run([sys.executable, "-c", CHILD, wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "outputs")
    for name, made in runs.items():
        if name.endswith("alone"):
            assert kl(made.logits, logits[name]) < 1e-8, name
            continue
        assert kl(made.logits, logits[f"{name} folded"]) < 1e-8, name
        assert kl(made.logits, logits[f"{name} dequantized"]) <= 1e-3, name
        assert (
            kl(logits[f"{name} oracle"], logits[f"{name} original"])
            <= 1e-3
            < kl(made.logits, logits[f"{name} original"])
        ), name
