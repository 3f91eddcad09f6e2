"""The folder of an export and of a merge: killed at any system call, the old or the new folder is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.checkpoint import atomic_folder
from lowrank_tune.errors import TrainingError
from lowrank_tune.export.output_folder import export_folder


def ignore(event: object) -> None:
    pass


def write_export(target: Path, text: str) -> None:
    with export_folder(target, {}, ignore) as folder:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "sub" / "b.txt").write_text(text)


def count_calls(monkeypatch: pytest.MonkeyPatch, die_at: int | None) -> list[str]:
    """Ends the process at call number `die_at` of os.fsync and os.replace. Returns a list that records the calls."""
    calls: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == die_at:
                os._exit(7)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace"):
        wrap(name)
    return calls


def content(folder: Path) -> set[str]:
    return {file.read_text() for file in folder.rglob("*.txt")}


@pytest.mark.parametrize("again", [False, True])
def test_export_killed_at_any_call_is_complete_or_absent(tmp_path: Path, again: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if again:
            write_export(tmp_path / "count" / "out", "old")
        calls = count_calls(patch, None)
        write_export(tmp_path / "count" / "out", "new")
        number = len(calls)
    assert number >= 7, "three files, two folders, the name, the parent"
    for die_at in range(number):
        target = tmp_path / str(die_at) / "out"
        if again:
            write_export(target, "old")
        child = os.fork()
        if child == 0:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    count_calls(patch, die_at)
                    write_export(target, "new")
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        backup = target.with_name(".aside-out")
        left = target if target.exists() else backup
        if again or left.exists():
            assert content(left) in ({"old"}, {"new"}) and (left / "export.json").exists()
        write_export(target, "next")
        assert content(target) == {"next"} and [path.name for path in target.parent.iterdir()] == ["out"]


def test_atomic_folder_without_overwrite_refuses_a_folder_that_appeared_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    with (
        pytest.raises(TrainingError, match="cannot write .*merged"),
        atomic_folder(target, overwrite=False) as folder,
    ):
        (folder / "a.txt").write_text("new")
        target.mkdir()
        (target / "mine.txt").write_text("precious")
    assert content(target) == {"precious"} and [path.name for path in tmp_path.iterdir()] == ["merged"]
