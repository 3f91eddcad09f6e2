"""The examples run unchanged, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    environ = {
        **os.environ,
        "PYTHONPATH": str(script.parent.parent),
        "LOWRANK_TUNE_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout


def test_every_algorithm_has_an_example() -> None:
    assert {path.stem for path in EXAMPLES} >= {"sft", "reward", "dpo", "kto", "preference", "rlhf"}
