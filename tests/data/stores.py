"""What the tests read of a store besides its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lowrank_tune.data import TokenizedDataset
from lowrank_tune.errors import ConfigProblem


def dropped_rows(store: TokenizedDataset) -> Iterator[ConfigProblem]:
    """Yields every row that was read and not used, with its location and its reason."""
    with (store.folder / "dropped.jsonl").open(encoding="utf-8") as file:
        for line in file:
            fault = json.loads(line)
            yield ConfigProblem(fault["reason"], file=fault["file"], line=fault["line"])
