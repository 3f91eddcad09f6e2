"""Recipes, and what they extend, that are not regular files of a sane size: refused at once, and a pipe is read."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_tune import regular_files
from lowrank_tune.config import load, load_any
from lowrank_tune.config.extends import MAX_READ_BYTES
from lowrank_tune.errors import UserError
from lowrank_tune.regular_files import UnreadableFile, read_file_or_pipe, read_regular_file

RECIPE = b"algorithm: sft\ndata: {train: [{dataset: 'builtin:arithmetic'}]}\ntrain: {max_steps: 3}\n"


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


def make_loop(path: Path) -> None:
    path.symlink_to(path.with_suffix(".other.yaml"))
    path.with_suffix(".other.yaml").symlink_to(path)


SPECIAL_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "FIFO": (os.mkfifo, "it is a FIFO, not a regular file"),
    "device without end": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a regular file"),
    "folder": (Path.mkdir, "is a folder, and a recipe is a YAML file"),
    "1 GiB": (make_sparse, f"it has 1,073,741,824 bytes, and the limit is {MAX_READ_BYTES:,}"),
    "links in a circle": (make_loop, "[Ss]ymbolic links|loop"),
}


@pytest.mark.parametrize("case", SPECIAL_FILES)
def test_extends_only_regular_files_of_sane_size(case: str, tmp_path: Path) -> None:
    make, message = SPECIAL_FILES[case]
    make(tmp_path / "parent.yaml")
    (tmp_path / "child.yaml").write_bytes(b"extends: ./parent.yaml\n" + RECIPE)
    (tmp_path / "chain.yaml").write_bytes(b"stages: [{name: a, extends: ./parent.yaml}, {name: b, algorithm: dpo}]\n")
    start = time.monotonic()
    for name in ("child.yaml", "chain.yaml"):
        with pytest.raises(UserError, match=f"extends: .*{message}"):
            load_any(tmp_path / name)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("case", ["device without end", "1 GiB", "links in a circle"])
def test_recipe_is_a_regular_file_of_sane_size(case: str, tmp_path: Path) -> None:
    make, message = SPECIAL_FILES[case]
    make(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "recipe.yaml")


def test_fifo_without_a_writer_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="it is a FIFO, and no process writes to it"):
        load(tmp_path / "recipe.yaml")


def test_recipe_from_a_pipe() -> None:
    """A shell's `run <(command)` gives such a path. The writer may be slower than the reader."""
    reader, writer = os.pipe()

    def write() -> None:
        for part in (RECIPE[:30], RECIPE[30:]):
            time.sleep(0.05)
            os.write(writer, part)
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    recipe = load(f"/dev/fd/{reader}")
    thread.join()
    os.close(reader)
    assert recipe.train.max_steps == 3


def test_pipe_that_stays_open_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_files, "PIPE_SECONDS", 0.1)
    reader, writer = os.pipe()
    os.write(writer, RECIPE)
    with pytest.raises(UnreadableFile, match="has not closed it after 0.1 s"):
        read_file_or_pipe(Path(f"/dev/fd/{reader}"), 1000)
    os.close(writer)
    os.close(reader)


def test_pipe_and_file_of_the_kernel_have_a_limit() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x" * 1001)
    with pytest.raises(UnreadableFile, match="more than 1,000 bytes"):
        read_file_or_pipe(Path(f"/dev/fd/{reader}"), 1000)
    os.close(writer)
    os.close(reader)
    with pytest.raises(UnreadableFile, match="more than 5 bytes"):
        read_regular_file(Path("/proc/self/status"), 5)
