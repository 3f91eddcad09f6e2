"""The doctor on this machine, on broken ones, and the presets' commands."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lowrank_tune import doctor
from lowrank_tune.cli import app
from lowrank_tune.doctor import Finding, examine, show, within


def found(findings: list[Finding], what: str) -> Finding:
    return next(each for each in findings if each.what == what)


def test_this_machine() -> None:
    made = CliRunner().invoke(app, ["doctor"])
    assert (
        made.exit_code == 0
        and "NF4 product" in made.output
        and "this machine is fit" in made.output
        and "\x1b" not in made.output
    )
    assert "requires_grad" not in made.output


def test_a_token_is_never_shown(tmp_path: Path) -> None:
    findings = examine(
        {"HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "LOWRANK_TUNE_CACHE": str(tmp_path)}
    )
    file = io.StringIO()
    show(findings, Console(file=file, width=120))
    assert "hf_secret" not in file.getvalue() and found(findings, "hub token").found == "there is one"
    assert found(findings, "hub").level == "warning" and all(
        bool(each.cure) == (each.level != "ok") for each in findings
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
    monkeypatch.setattr(doctor, "requirements", lambda: {"peft": ">=0.21,<0.22", "torch": ">=2.9,<3"})
    monkeypatch.setattr(doctor, "_writable", lambda folder: False)
    findings = examine({"LOWRANK_TUNE_CACHE": str(tmp_path)})
    assert found(findings, "4 bits").level == "fault" and "libcudart" in found(findings, "4 bits").found
    assert found(findings, "peft").cure == "pip install 'peft>=0.21,<0.22'" and found(findings, "torch").level == "ok"
    assert found(findings, "cache").level == "fault" and "LOWRANK_TUNE_CACHE" in found(findings, "cache").cure
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_unsloth_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(version: str | None, wrong: list[str], card: bool = False) -> Finding:
        monkeypatch.setattr(doctor.early, "installed", lambda: version)
        monkeypatch.setattr(doctor.early, "misfits", lambda: wrong)
        monkeypatch.setattr("torch.cuda.is_available", lambda: card)
        return next(doctor.unsloth())

    assert told(None, []).level == "ok" and "not installed" in told(None, []).found
    assert (
        told("2026.10.9", ["trl<=1.15.0 (1.16.0 is installed)"]).found
        == "2026.10.9, which needs trl<=1.15.0 (1.16.0 is installed)"
    )
    assert "refused here" in told("2026.10.9", ["trl<=1.15.0 (1.16.0 is installed)"]).cure
    assert "no card" in told("2026.10.9", []).found and told("2026.10.9", [], card=True).level == "ok"


def test_bounds() -> None:
    assert set(doctor.NEEDED) <= {name if name != "pyyaml" else "PyYAML" for name in doctor.requirements()}
    for version, bounds, fits in (
        ("2.9", ">=2.9,<3", True),
        ("3.0.0", ">=2.9,<3", False),
        ("2.13.0+cpu", ">=2.9", True),
        ("2.8.9", ">=2.9", False),
        ("1.16.0", "==1.16", True),
        ("5.0rc1", ">=5", True),
        ("1", "", True),
    ):
        assert within(version, bounds) == fits, (version, bounds)


def test_presets_are_listed_shown_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def say(*arguments: str) -> tuple[int, str]:
        made = CliRunner().invoke(app, ["presets", *arguments])
        return made.exit_code, made.output

    assert say()[0] == 0 and "tiny-sft" in say()[1]
    code, shown = say("show", "tiny-sft")
    assert code == 0 and "extends" not in shown and "tutor" in shown
    assert say("copy", "tiny-sft")[0] == say("copy", "tiny-sft", "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "tiny-sft.yaml").read_text() == shown
    (tmp_path / "mine.yaml").write_text("mine")
    code, told = say("copy", "tiny-sft", "mine.yaml")
    assert code == 2 and "is there already" in told and (tmp_path / "mine.yaml").read_text() == "mine"
    assert say("copy", "tiny-sft", "no/folder.yaml")[0] == 2 and "did you mean" in say("show", "tiny-sfd")[1]
