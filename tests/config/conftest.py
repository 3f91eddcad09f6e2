"""Fixtures of the tests of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_helpers import Write


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into an empty working directory, so that problems contain its bare name. Returns its path."""
    monkeypatch.chdir(tmp_path)

    def make(text: str, name: str = "my.yaml") -> str:
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text(text)
        return f"./{name}"

    return make
