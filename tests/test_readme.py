"""The recipes in the README load as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

from lowrank_tune.recipe import load_any

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_recipe_in_the_readme_loads(tmp_path: Path) -> None:
    """A block that begins with `# FILE.yaml` is that file, which later blocks extend."""
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) >= 5
    files = []
    for number, block in enumerate(blocks):
        named = re.match(r"# (\S+\.yaml)\b", block)
        files.append(tmp_path / (named[1] if named else f"block-{number}.yaml"))
        files[-1].write_text(block, encoding="utf-8")
    for file in files:
        load_any(str(file))
