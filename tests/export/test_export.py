"""`export`: what arrives is what was trained, bad input is one sentence, and nothing half-written stays."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from export_fixtures import IDS, FinishedRun, kl, make_run
from models import CPU
from peft import PeftModel
from test_gguf_lora import by_llama_cpp, by_peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Tokenizer
from typer.testing import CliRunner

from lowrank_tune import UserError
from lowrank_tune.assembly.finished_run import adapters_in, load_finished_run
from lowrank_tune.cli import app
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import Event, Progress
from lowrank_tune.export.combine_lora import saved_lora_adapter
from lowrank_tune.export.export import ExportOptions, export
from lowrank_tune.export.gguf import llama_cpp
from lowrank_tune.export.gguf.model import BITS_PER_WEIGHT, convert, estimate_gguf_size, pretokenizer_name, run_tool
from lowrank_tune.export.merge import find_existing_merge

TAKE = "lowrank_tune.export.export"


def quiet(event: object) -> None:
    pass


def take(made: FinishedRun, order: ExportOptions) -> Path:
    return Path(export(made.run, order, quiet, quiet, quiet, CPU))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("mistral"), "mistral", lower=("sft",), rslora=True)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("apart"), "qwen3", tied=True, lower=("sft",), rslora=True, stack="separate")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)


def copy_of(made: FinishedRun, place: Path) -> Path:
    shutil.copytree(made.run, place)
    return place


@pytest.mark.parametrize("which", ["mistral", "apart"])
def test_a_gguf_adapter_is_what_was_trained(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(which)
    folder = take(made, ExportOptions("gguf-lora", tmp_path / "out"))
    found = by_llama_cpp(folder / "tried-lora-f32.gguf")
    saved = adapters_in(load_finished_run(made.run)).values()
    wanted = by_peft([saved_lora_adapter(one.config.to_dict(), one.tensors) for one in saved])
    assert found.keys() == wanted.keys() and all(
        torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted
    )
    with torch.no_grad():  # the changes of the file, added to the weights that were trained over, answer as the run did
        model = trained_over(made)
        for name, change in found.items():
            layer = model.get_submodule(name)
            layer.register_forward_hook(lambda layer, given, out, change=change: out + given[0] @ change.float().T)
        assert kl(made.logits, model(input_ids=IDS).logits[0]) < 1e-8
    facts = json.loads((folder / "export.json").read_text())
    assert facts["to"] == "gguf-lora" and facts["files"].keys() == {"README.md", "tried-lora-f32.gguf"}
    digest = hashlib.sha256((folder / "tried-lora-f32.gguf").read_bytes()).hexdigest()
    assert (
        facts["files"]["tried-lora-f32.gguf"]["sha256"] == digest and "llama-cli" in (folder / "README.md").read_text()
    )
    for file in folder.iterdir():
        assert str(made.run).encode() not in file.read_bytes() and b"somebody" not in file.read_bytes(), file


def trained_over(made: FinishedRun) -> Any:
    """The base in 4 bits, with plain transformers."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32, quantization_config=four)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # or it computes in bf16 on some machines
    return model.eval()


def test_a_copy_loads_in_plain_peft_and_a_modelfile_names_the_base(mistral: FinishedRun, tmp_path: Path) -> None:
    folder = take(mistral, ExportOptions("peft", tmp_path / "peft"))
    assert not (folder / "manifest.json").exists() and (folder / "policy" / "adapter_config.json").exists()
    with torch.no_grad():
        assert (
            kl(mistral.logits, PeftModel.from_pretrained(trained_over(mistral), folder).eval()(input_ids=IDS).logits[0])
            < 1e-8
        )
    folder = take(
        mistral,
        ExportOptions(
            "ollama", tmp_path / "ollama", ollama_format="adapter", ollama_base="mistral:7b", system="Be brief."
        ),
    )
    text = (folder / "Modelfile").read_text()
    for line in (
        "FROM mistral:7b",
        "ADAPTER ./tried-lora-f32.gguf",
        'SYSTEM "Be brief."',
        'PARAMETER stop "<|end_of_turn|>"',
        "PARAMETER num_ctx 256",
    ):
        assert line in text.splitlines(), line
    assert (
        "<|user|>{{ else }}<|begin_of_text|><|user|>{{ end }}" in text
        and "ollama create tried" in (folder / "README.md").read_text()
    )


def test_only_our_own_exports_are_replaced(
    mistral: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    order = ExportOptions("peft", out)
    out.mkdir()
    take(mistral, order)  # an empty folder is nobody's
    old = (out / "export.json").read_bytes()
    take(mistral, order)
    with monkeypatch.context() as patch:  # a failure in the middle leaves the old one as it was
        patch.setattr(f"{TAKE}.write_gguf_lora", broken)
        with pytest.raises(TrainingError, match="the disk is full: .* are needed, .* are free on .* with --out"):
            take(mistral, replace(order, to="gguf-lora"))
    assert (out / "export.json").read_bytes() == old and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".tmp-out-dead").mkdir()  # of one that was killed
    out.rename(tmp_path / ".aside-out")
    take(mistral, replace(order, to="gguf-lora"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "tried-lora-f32.gguf").exists()
    (out / "mine.txt").write_text("!")
    for target, sentence in (
        (out, "contains mine.txt, which is not part of an export"),
        (mistral.run / "final", "is not part of an export of this program"),
        (out / "mine.txt", "is not a folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            take(mistral, replace(order, out=target))
    assert (out / "mine.txt").exists() and (mistral.run / "final" / "manifest.json").exists()


def broken(*arguments: Any) -> None:
    arguments[0].write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_what_cannot_be_exported_fails_with_one_sentence(
    mistral: FinishedRun, apart: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(run: Path, *more: str) -> str:
        done = CliRunner().invoke(app, ["export", str(run), *more])
        assert done.exit_code == 2 and done.output.count("\n") == 1, done.output
        return done.output

    gguf_lora, gguf = ("--to", "gguf-lora"), ("--to", "gguf")
    assert "there is no such run" in error_of(tmp_path / "nowhere", *gguf)
    unfinished = copy_of(mistral, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "final")
    assert "has not ended" in error_of(unfinished, *gguf_lora)
    damaged = copy_of(mistral, tmp_path / "damaged")
    (damaged / "final" / "adapter_config.json").write_text("{}")
    assert "final is broken: adapter_config.json has" in error_of(damaged, "--to", "peft")
    changed, gone = copy_of(mistral, tmp_path / "changed"), copy_of(mistral, tmp_path / "gone")
    facts = json.loads((changed / "base.json").read_text())
    facts["tensors"]["model.layers.1.mlp.up_proj.weight"] = "0" * 32
    (changed / "base.json").write_text(json.dumps(facts))
    assert "is not the base that" in error_of(changed, *gguf_lora) and "1 of its" in error_of(changed, *gguf_lora)
    facts = json.loads((gone / "run.json").read_text())
    facts["recipe"]["base"]["model"] = str(tmp_path / "no-base")
    (gone / "run.json").write_text(json.dumps(facts))
    assert "there is no folder" in error_of(gone, *gguf_lora) and "there is no folder" in error_of(gone, *gguf)
    assert "--quantization q9 is not supported by this export; supported: f32, f16, bf16" in error_of(
        mistral.run, *gguf_lora, "--quantization", "q9"
    )
    assert "--repo, --public do nothing with --to peft" in error_of(
        mistral.run, "--to", "peft", "--repo", "a/b", "--public"
    )
    assert "--weights, --ollama-base do nothing with --to gguf-lora" in error_of(
        mistral.run, *gguf_lora, "--weights", "original", "--ollama-base", "x"
    )
    assert "--to hub needs --repo user/name" in error_of(mistral.run, "--to", "hub")
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda name: None)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert "q4_k_m needs llama.cpp's quantizer" in error_of(mistral.run, *gguf, "--quantization", "Q4_K_M")
    assert "this Python has no pip" in error_of(mistral.run, *gguf)
    assert "does not contain convert_hf_to_gguf.py" in error_of(mistral.run, *gguf, "--llama-cpp", str(tmp_path))
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text('"LlamaForCausalLM"')
    assert "does not support MistralForCausalLM" in error_of(
        mistral.run, *gguf, "--llama-cpp", str(tmp_path / "llama.cpp")
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert "pip install 'lowrank-tune[export]'" in error_of(mistral.run, *gguf_lora)
    with monkeypatch.context() as patch:
        patch.setattr(f"{TAKE}.load_config", lambda base: SimpleNamespace(model_type="opt"))
        assert "a GGUF adapter of a model of type opt is not supported" in error_of(mistral.run, *gguf_lora)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=1, used=1, free=0))
    for what in (gguf_lora, gguf, ("--to", "peft"), ("--to", "ollama")):
        assert "GiB are free there; give another folder with --out" in error_of(mistral.run, *what)
    assert not (mistral.run / "export").exists() and not list(tmp_path.glob("**/.tmp*"))


# ---- llama.cpp's converter: where it is found, and how its output is handled


def archive(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source package with what belongs in the cache, and with what must not get there."""
    root, file = f"llama_cpp_python-{llama_cpp.VERSION}", place / "package.tar.gz"
    with tarfile.open(file, "w:gz") as out:
        for name in (
            "vendor/llama.cpp/convert_hf_to_gguf.py",
            "vendor/llama.cpp/conversion/base.py",
            "vendor/llama.cpp/src/llama.cpp",
            "setup.py",
            "vendor/llama.cpp/conversion/../../../../../evil.py",
        ):
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = 4
            out.addfile(member, io.BytesIO(b"1234"))
        link = tarfile.TarInfo(f"{root}/vendor/llama.cpp/conversion/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)
    monkeypatch.setattr(llama_cpp, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_converter_is_taken_from_the_package_whose_hash_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    file = archive(tmp_path, monkeypatch)
    other = tmp_path / "other.tar.gz"
    other.write_bytes(b"no")
    with pytest.raises(UserError, match="its sha256 differs"):
        llama_cpp.converter_folder(other, quiet)
    folder = llama_cpp.converter_folder(file, quiet)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        "convert_hf_to_gguf.py",
        "conversion/base.py",
    }
    assert not list(tmp_path.rglob("evil.py")) and [path.name for path in (tmp_path / "cache").iterdir()] == [
        folder.name
    ]
    commands = list[list[str]]()
    monkeypatch.setattr(llama_cpp.subprocess, "run", lambda command, **more: commands.append(command))
    assert llama_cpp.converter_folder(None, quiet) == folder and not commands, "it is there already"
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    assert llama_cpp.converter_folder(None, quiet) == folder


def test_pip_is_given_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    file = archive(tmp_path, monkeypatch)

    def pip(command: list[str], **more: Any) -> Any:
        wanted = Path(command[command.index("-r") + 1]).read_text()
        assert (
            wanted == f"llama-cpp-python=={llama_cpp.VERSION} --hash=sha256:{llama_cpp.SHA256}\n"
            and "--require-hashes" in command
        )
        shutil.copy(file, Path(command[command.index("-d") + 1]) / llama_cpp.ARCHIVE)
        return SimpleNamespace(returncode=0, stderr="")

    with monkeypatch.context() as patch:
        patch.setattr(
            llama_cpp.subprocess,
            "run",
            lambda *_, **__: SimpleNamespace(returncode=1, stderr="a\nERROR: No matching\nnotice"),
        )
        with pytest.raises(TrainingError, match=r"could not be fetched \(No matching\): download llama_cpp_python"):
            llama_cpp.converter_folder(None, quiet)
    events = list[Event]()
    monkeypatch.setattr(llama_cpp.subprocess, "run", pip)
    assert (llama_cpp.converter_folder(None, events.append) / "convert_hf_to_gguf.py").exists()
    assert "fetched once from the package index" in str(events[0])


def test_the_output_of_a_tool_becomes_progress_and_a_sentence(tmp_path: Path) -> None:
    events = list[Event]()
    code, output = run_tool(
        [sys.executable, "-c", "print('[ 1/ 4] a'); print('x\\r[ 2/4] b', end=''); raise SystemExit(3)"],
        "tool",
        r"\[\s*(\d+)/\s*(\d+)\]",
        events.append,
    )
    assert code == 3 and output[-1] == "[ 2/4] b"
    assert [(event.done, event.total) for event in events if isinstance(event, Progress)] == [(0, 100), (1, 4), (2, 4)]
    for script, sentence, kind in (
        ("raise ImportError(\"No module named 'sentencepiece'\")", "needs the package sentencepiece", UserError),
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized')",
            "does not support this base's tokenizer",
            UserError,
        ),
        ("raise SystemExit('ERROR: out of luck')", "failed .exit code 1.: ERROR: out of luck", TrainingError),
    ):
        (tmp_path / "convert_hf_to_gguf.py").write_text(script)
        with pytest.raises(kind, match=sentence):
            convert(tmp_path, tmp_path, tmp_path / "x.gguf", "f16", "mine", False, quiet)


def test_pretokenizer_name_is_known_only_for_the_same_rules(mistral: FinishedRun, tmp_path: Path) -> None:
    assert pretokenizer_name(mistral.base) == "smollm"
    Qwen2Tokenizer().save_pretrained(tmp_path)
    assert pretokenizer_name(tmp_path) == "qwen2"
    raw = json.loads((mistral.base / "tokenizer.json").read_text())
    digits, bytes_ = raw["pre_tokenizer"]["pretokenizers"]
    for changes, name in (
        ({"pre_tokenizer": bytes_}, "gpt-2"),
        ({"pre_tokenizer": digits}, None),
        ({"normalizer": {"type": "NFC"}}, None),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits | {"individual_digits": False}, bytes_]}},
            None,
        ),
        ({"model": {"type": "Unigram"}}, None),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw | changes))
        assert pretokenizer_name(tmp_path) == name, changes


def test_estimated_sizes_and_type_numbers() -> None:
    assert (
        estimate_gguf_size(1000, "bf16") == 2100
        and estimate_gguf_size(1000, "q8_0") == 1115
        and estimate_gguf_size(1000, "q4_k_m") > 2100 + 600
    )
    import gguf

    for name, (_, number) in BITS_PER_WEIGHT.items():
        assert gguf.LlamaFileType(number).name in (f"MOSTLY_{name.upper()}", f"ALL_{name.upper()}")


def test_a_merged_model_is_taken_only_with_this_adapter(mistral: FinishedRun, tmp_path: Path) -> None:
    run = copy_of(mistral, tmp_path / "run")
    found = load_finished_run(run)
    assert find_existing_merge(found, "dequantized") is None
    proof = {
        "prompts": 1,
        "places": 1,
        "kl": 0.0,
        "worst_kl": 0.0,
        "logit_difference": 0.0,
        "same": 1,
        "near_ties": 0,
        "parted": 0,
        "trained_loss": 0.0,
        "merged_loss": 0.0,
        "rows": 0,
        "ends_agree": True,
        "origin": "",
    }
    (run / "merged").mkdir()
    (run / "merged" / "merge.json").write_text(
        json.dumps({"base": "dequantized", "adapter": found.fingerprint(), **proof})
    )
    before = find_existing_merge(found, "dequantized")
    assert before is not None and before.folder == run / "merged" and before.report.prompts == 1
    config = run / "final" / "adapter_config.json"
    config.write_bytes(config.read_bytes() + b" ")
    assert find_existing_merge(found, "dequantized") is None
