"""The doctor on this machine, on broken ones, and the presets' commands."""

from __future__ import annotations

import importlib
import io
import shutil
import socket
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from rich.console import Console
from support_matrix import CONFIG, FAMILIES
from transformers import AutoConfig
from typer.testing import CliRunner

from lowrank_tune import doctor
from lowrank_tune.cli import app
from lowrank_tune.config import BaseConfig
from lowrank_tune.doctor import CheckResult, in_range, print_results, run_checks
from lowrank_tune.model import architecture_notes
from lowrank_tune.model.base import pick_device
from lowrank_tune.offline import hub_address


def found(findings: list[CheckResult], what: str) -> CheckResult:
    return next(each for each in findings if each.name == what)


def test_this_machine() -> None:
    made = CliRunner().invoke(app, ["doctor"])
    assert (
        made.exit_code == 0
        and "NF4 product" in made.output
        and "this machine is ready" in made.output
        and "\x1b" not in made.output
    )
    assert "requires_grad" not in made.output


def test_a_token_is_never_shown(tmp_path: Path) -> None:
    findings = run_checks(
        {"HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "LOWRANK_TUNE_CACHE": str(tmp_path)}
    )
    file = io.StringIO()
    print_results(findings, Console(file=file, width=120))
    assert "hf_secret" not in file.getvalue() and found(findings, "hub token").detail == "found"
    assert found(findings, "hub").level == "warning" and all(
        bool(each.fix) == (each.level != "ok") for each in findings
    )


def test_what_is_broken_is_a_fault_with_a_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.import_module

    def broken(name: str) -> Any:
        if name == "bitsandbytes":
            raise OSError("libcudart.so: cannot open")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    monkeypatch.setattr(
        doctor.metadata,
        "version",
        lambda name: "99.0" if name == "peft" else "2.9.0+cu128" if name == "torch" else "5.20",
    )
    bounds = {"peft": SpecifierSet(">=0.21,<0.22"), "torch": SpecifierSet(">=2.9,<3")}
    monkeypatch.setattr(doctor, "requirements", lambda: bounds)
    monkeypatch.setattr(doctor, "_writable", lambda folder: False)
    findings = run_checks({"LOWRANK_TUNE_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert found(findings, "4 bits").level == "fault" and "libcudart" in found(findings, "4 bits").detail
    assert found(findings, "peft").fix == f"pip install 'peft{bounds['peft']}'"
    assert found(findings, "torch").level == "ok"
    assert found(findings, "cache").level == "fault" and "LOWRANK_TUNE_CACHE" in found(findings, "cache").fix
    monkeypatch.setattr(doctor, "run_checks", lambda: findings)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_unsloth_is_reported_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_of(version: str | None, wrong: list[str], has_gpu: bool = False) -> CheckResult:
        monkeypatch.setattr(doctor.unsloth_import, "installed", lambda: version)
        monkeypatch.setattr(doctor.unsloth_import, "incompatible_versions", lambda: wrong)
        monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
        return next(doctor.unsloth())

    assert check_of(None, []).level == "ok" and "not installed" in check_of(None, []).detail
    assert (
        check_of("2026.10.9", ["trl<=1.15.0 (1.16.0 is installed)"]).detail
        == "2026.10.9, which needs trl<=1.15.0 (1.16.0 is installed)"
    )
    assert "refused here" in check_of("2026.10.9", ["trl<=1.15.0 (1.16.0 is installed)"]).fix
    assert "no GPU" in check_of("2026.10.9", []).detail and check_of("2026.10.9", [], has_gpu=True).level == "ok"


class NoCuda:
    """torch without a GPU of NVIDIA."""

    def is_available(self) -> bool:
        return False


class Intel:
    """torch.xpu of a machine with a GPU of Intel."""

    def is_available(self) -> bool:
        return True

    def get_device_name(self) -> str:
        return "Intel Arc B580"


def test_gpus_of_amd_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.hip", "7.1.2")
    # Without a driver: the cure is not CUDA.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(doctor.gpu_vendor()) == []
    (line,) = doctor.gpu()
    assert line.level == "warning" and "ROCm 7.1.2" in line.detail and "rocminfo" in line.fix
    assert "CUDA" not in line.detail + line.fix
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (line,) = doctor.gpu_vendor()
    assert line.level == "ok" and "AMD" in line.detail
    assert line.detail.endswith(": reported to work, not tested")


def test_gpus_of_intel_are_reported_as_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda", NoCuda())
    monkeypatch.setattr("torch.xpu", Intel())
    assert list(doctor.gpu()) == []
    (line,) = doctor.gpu_vendor()
    assert line.level == "warning" and line.detail.startswith("Intel Arc B580 (Intel): ")
    assert "reported to work" in line.detail and "not tested" in line.detail and "use the CPU" in line.fix
    assert pick_device().type == "cpu"


def test_a_gpu_of_nvidia_has_no_line_of_its_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert list(doctor.gpu_vendor()) == []


def test_kernels_of_linear_attention_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", not_installed)
    (line,) = doctor.linear_attention()
    assert line.level == "ok" and line.detail.startswith("no kernels installed; Qwen3.5 and other bases")
    assert doctor.LINEAR_ATTENTION_PACKAGE == architecture_notes.LINEAR_ATTENTION_PACKAGE
    assert line.detail.endswith("pip install flash-linear-attention")
    monkeypatch.setattr(doctor.metadata, "version", {"flash-linear-attention": "0.4.2"}.__getitem__)
    assert next(doctor.linear_attention()).detail == "flash-linear-attention 0.4.2"


def test_bounds() -> None:
    assert set(doctor.REQUIRED_PACKAGES) <= {name if name != "pyyaml" else "PyYAML" for name in doctor.requirements()}
    for version, bounds, fits in (
        ("2.9", ">=2.9,<3", True),
        ("3.0.0", ">=2.9,<3", False),
        ("2.13.0+cpu", ">=2.9", True),
        ("2.8.9", ">=2.9", False),
        ("1.16.0", "==1.16", True),
        ("5.0rc1", ">=5", True),
        ("1", "", True),
    ):
        assert in_range(version, SpecifierSet(bounds)) == fits, (version, bounds)


def test_presets_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def presets_command(*arguments: str) -> tuple[int, str]:
        made = CliRunner().invoke(app, ["presets", *arguments])
        return made.exit_code, made.output

    assert presets_command()[0] == 0 and "tiny-sft" in presets_command()[1]
    code, shown = presets_command("show", "tiny-sft")
    assert code == 0 and "extends" not in shown and "builtin:arithmetic" in shown
    assert presets_command("copy", "tiny-sft")[0] == presets_command("copy", "tiny-sft", "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "tiny-sft.yaml").read_text() == shown
    (tmp_path / "mine.yaml").write_text("mine")
    code, output = presets_command("copy", "tiny-sft", "mine.yaml")
    assert code == 2 and "is there already" in output and (tmp_path / "mine.yaml").read_text() == "mine"
    assert (
        presets_command("copy", "tiny-sft", "no/folder.yaml")[0] == 2
        and "did you mean" in presets_command("show", "tiny-sfd")[1]
    )


def hub_line(**environ: str) -> CheckResult:
    return found(list(doctor.hub({"HF_TOKEN": "x", **environ})), "hub")


def free_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


class Refusing(BaseHTTPRequestHandler):
    """Answers each request with 503, as a hub that is overloaded: it can be reached."""

    def do_HEAD(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_the_hub_is_tried_before_it_is_called_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert hub_line(HF_ENDPOINT=address) == CheckResult("ok", "hub", f"{address} answers")
    closed = f"http://127.0.0.1:{free_port()}"
    refused = hub_line(HF_ENDPOINT=closed)
    assert refused.level == "warning" and f"{closed} cannot be reached: " in refused.detail and refused.fix
    assert "refused" in refused.detail.lower()
    for wrong in ("nonsense", "http://[bad"):
        assert hub_line(HF_ENDPOINT=wrong).level == "warning"


def test_a_hub_that_never_answers_takes_no_longer_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        line = hub_line(HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert line.level == "warning" and time.monotonic() - began < 2


def test_an_answer_that_is_not_http_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another service at that port; the reason is there before the time limit."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(doctor, "HUB_SECONDS", 60)

    def answer(listening: socket.socket) -> None:
        with listening.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"220 mail\r\n")

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        threading.Thread(target=answer, args=(listening,), daemon=True).start()
        line = hub_line(HF_ENDPOINT=f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert line.level == "warning" and "cannot be reached: 220 mail" in line.detail


def test_credentials_of_a_mirror_are_never_shown() -> None:
    port = free_port()
    line = hub_line(HF_ENDPOINT=f"http://someone:s3cret@127.0.0.1:{port}/mirror")
    assert f"http://127.0.0.1:{port}/mirror cannot be reached" in line.detail and "s3cret" not in repr(line)
    for address in ("https://a:s3cret@b@c.org/x@y", "a:s3cret@c.org/x@y"):
        assert hub_address({"HF_ENDPOINT": address}).removeprefix("https://") == "c.org/x@y"
    assert hub_address({}) == hub_address({"HF_ENDPOINT": ""}) == "https://huggingface.co"


def test_the_hub_is_not_tried_offline() -> None:
    line = hub_line(HF_HUB_OFFLINE="1", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert line.detail == "not tried: HF_HUB_OFFLINE is set" and "unset HF_HUB_OFFLINE" in line.fix


def test_a_gpu_without_bfloat16_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla T4")
    (result,) = doctor.gpu()
    assert result.level == "ok"
    assert result.detail == "Tesla T4, 15.0 of 16.0 GiB free, bf16 no: float16 is used, with loss scaling"


def test_a_small_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = (doctor.MIN_DISK_GIB + doctor.RECOMMENDED_DISK_GIB) / 2
    usage = shutil.disk_usage(tmp_path)._replace(free=int(free * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    results = list(doctor.disk({"HF_HOME": str(tmp_path), "LOWRANK_TUNE_CACHE": str(tmp_path)}))
    assert results and all(
        result.level == "warning" and "enough for small bases only" in result.fix for result in results
    )


def test_the_base_of_a_recipe_is_checked(tmp_path: Path) -> None:
    """Of a mixture, of a base with linear attention, and of one with neither, from their configurations alone."""
    family = next(family for family in FAMILIES if family.model_type == "qwen3_moe")
    AutoConfig.for_model("qwen3_moe", **CONFIG | dict(family.changes)).save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: tiny-sft\nbase: {{model: {tmp_path}}}\n")
    made = CliRunner().invoke(app, ["doctor", str(recipe)])
    assert made.exit_code == 0 and "the experts stay in 16 bits: 0.00 GiB, " in " ".join(made.output.split())
    results = doctor.run_checks(base=BaseConfig(model="Qwen/Qwen3.5-4B"))
    assert [result.level for result in results if result.name == "base"] == ["ok", "warning"]
    assert "flash-linear-attention is not installed" in found(results[-1:], "base").fix
    (result,) = doctor.base_on_gpu(BaseConfig(model="Qwen/Qwen3-4B"))
    assert result.detail == "Qwen/Qwen3-4B: nothing to report"
    assert "nothing-there" in found(run_checks(base=BaseConfig(model=str(tmp_path / "nothing-there"))), "base").detail
