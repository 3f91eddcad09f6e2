"""The README: short, one picture, and each of its commands that needs neither a GPU nor an environment runs."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown import README, commands, fenced_blocks, links

MAX_WORDS = 900
NEEDS_AN_ENVIRONMENT = {"git", "cd", "make", "pip", "."}
"""First words of the commands that clone, install or activate."""
TEXT = README.read_text(encoding="utf-8")


def test_the_readme_is_short_and_has_one_picture() -> None:
    assert 400 < len(TEXT.split()) <= MAX_WORDS
    assert len(re.findall(r"!\[", TEXT)) == 1
    assert len([link for link in links(TEXT) if link.startswith("docs/")]) > 15


def write_rows(file: Path, count: int = 200) -> None:
    """Writes rows of the README's shape: sums of two numbers."""
    (shape,) = re.findall(r'`(\{"prompt": .+?\})`', TEXT)
    assert json.loads(shape).keys() == {"prompt", "completion"}
    rng = random.Random(0)
    with file.open("w", encoding="utf-8") as opened:
        for _ in range(count):
            a, b = rng.randint(2, 40), rng.randint(2, 40)
            opened.write(json.dumps({"prompt": f"What is {a} + {b}?", "completion": f"It is {a + b}."}) + "\n")


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    (recipe,) = fenced_blocks(TEXT, "yaml")
    (tmp_path / "my.yaml").write_text(recipe.text, encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": str(README.parent), "LOWRANK_TUNE_CACHE": str(tmp_path / "cache")}
    ran = []
    for words in [words for block in fenced_blocks(TEXT, "sh") for words in commands(block)]:
        if words[0] in NEEDS_AN_ENVIRONMENT:
            continue
        assert words[0] == "lowrank-tune"
        done = subprocess.run(
            [sys.executable, "-m", "lowrank_tune", *words[1:]],
            cwd=tmp_path,
            env=environ,
            input="What is 2 + 3?\n",
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
        ran.append(words[1])
    assert {"doctor", "data", "run", "chat", "eval", "merge", "export"} <= {*ran}
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    (program,) = fenced_blocks(TEXT, "python")
    done = subprocess.run(
        [sys.executable, "-c", program.text], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr
