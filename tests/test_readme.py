"""The README: its recipes load as they stand there, and its table of metrics is complete."""

from __future__ import annotations

import re
from pathlib import Path

from lowrank_tune.recipe import load_any
from lowrank_tune.ui.metrics import DESCRIPTIONS, DESCRIPTIONS_BY_ALGORITHM

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


def test_every_described_metric_is_in_the_table() -> None:
    """Held-out metrics stand there with the variant that they belong to."""
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## What the numbers mean") : text.index("## Evaluate")]
    names = {*DESCRIPTIONS, *(name for own in DESCRIPTIONS_BY_ALGORITHM.values() for name in own)}
    assert len(names) > 40
    assert [name for name in sorted(names) if f"`{name.replace('heldout/', 'heldout/VARIANT/')}`" not in table] == []
