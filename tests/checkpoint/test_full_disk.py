"""A full disk: each message has what is needed, what is free, the folder, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from failing_disk import FailingDisk, Fault

from lowrank_tune import full_disk
from lowrank_tune.algorithms import reference_logps
from lowrank_tune.checkpoint import Snapshot, as_user_error, atomic_folder, write_atomically, write_file
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.full_disk import CACHE_CURE, EXPORT_CURE, RUN_CURE, format_size, full_disk_reason, raise_if_full

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=300 << 10))


def test_a_checkpoint_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the harness, in this process: each write below the folder fails."""
    disk = FailingDisk([str(tmp_path)], Fault("ENOSPC", 0))
    monkeypatch.setattr(os, "write", disk._checked_write(os.write))
    snapshot = Snapshot(tensors={"policy/adapter_model.safetensors": {"weight": torch.zeros(1 << 19)}})
    with pytest.raises(TrainingError) as caught:
        write_atomically(tmp_path / "checkpoints" / "step-8", snapshot)
    assert str(caught.value) == (
        f"cannot write {tmp_path}/checkpoints/step-8: the disk is full: 2.0 MiB are needed, 300.0 KiB are free on the "
        f"disk of {tmp_path}/checkpoints; free some space or lower train.save_total_limit, and the same command "
        "continues; or name a folder on another disk with --out"
    )
    assert disk.hit and list((tmp_path / "checkpoints").iterdir()) == [], "nothing half-written stays"


def test_a_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk([str(tmp_path)], Fault("full", 0))
    monkeypatch.setattr(os, "write", disk._checked_write(os.write))
    with pytest.raises(TrainingError, match=r"summary.json: the disk is full: 3.0 KiB are needed, 300.0 KiB are free"):
        write_file(tmp_path / "summary.json", b"x" * 3072)


@pytest.mark.parametrize("cure", [RUN_CURE, EXPORT_CURE, CACHE_CURE])
def test_the_cure_fits_the_folder(tmp_path: Path, cure: str) -> None:
    with pytest.raises(TrainingError) as caught, atomic_folder(tmp_path / "made", needed=5 << 30, cure=cure):
        raise FULL
    assert "5.0 GiB are needed" in str(caught.value) and str(caught.value).endswith(cure)
    assert {"--out", "LOWRANK_TUNE_CACHE"} & set(cure.replace(",", "").split()), "it names another place"


def test_a_copy_that_hides_the_reason(tmp_path: Path) -> None:
    """`shutil.copytree` has its reasons in a list, without a number."""
    error = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
    assert error.errno is None
    with pytest.raises(UserError, match="the disk is full: .*free on the disk"), as_user_error(tmp_path / "out"):
        raise error


def test_other_errors_have_no_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, as_user_error(tmp_path / "x", 7, EXPORT_CURE):
        raise OSError(errno.EACCES, "no")
    assert str(caught.value) == f"cannot write {tmp_path / 'x'}: permission denied"
    assert full_disk_reason(OSError(errno.EIO, "x")) == "" == full_disk_reason(ValueError("x"))
    assert full_disk_reason(OSError(errno.EDQUOT, "x")) == "the disk quota is used up"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("I/O error: Disk quota exceeded (os error 122)", "the disk quota is used up"),
    ],
)
def test_the_output_of_another_program(text: str, reason: str) -> None:
    assert full_disk_reason(ValueError(text)) == reason, "a library that hides the number"
    with pytest.raises(OSError, match="no space|quota") as caught:
        raise_if_full(text)
    assert full_disk_reason(caught.value) == reason


def test_the_output_about_another_fault() -> None:
    raise_if_full("OSError: [Errno 5] Input/output error")


def test_log_probs_of_the_reference_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(reference_logps.tempfile, "mkstemp", refuse)
    with pytest.raises(TrainingError) as caught:
        reference_logps._write_cache(tmp_path / "logps" / "a.safetensors", torch.zeros(1024))
    assert "4.0 KiB are needed, 300.0 KiB are free" in str(caught.value)
    assert f"on the disk of {tmp_path}/logps" in str(caught.value) and "LOWRANK_TUNE_CACHE" in str(caught.value)


def test_an_unknown_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError

    monkeypatch.setattr(full_disk.shutil, "disk_usage", refuse)
    words = full_disk.describe_full_disk(tmp_path / "x", "the disk is full", "free some space")
    assert words == f"the disk is full: an unknown amount is free on the disk of {tmp_path}; free some space"


def test_sizes() -> None:
    assert [format_size(size) for size in (0, 512, 5 << 20, 3 << 30)] == ["0 B", "512 B", "5.0 MiB", "3.0 GiB"]
