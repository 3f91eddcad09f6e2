"""Stores of units of any number of rows, from ids and masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowrank_tune.batch import Row
from lowrank_tune.data import TokenizedDataset
from lowrank_tune.data.report import SourceReport
from lowrank_tune.data.store_writer import Entry, StoreWriter


def write_units(
    folder: Path, units: Sequence[Sequence[Row]], format_name: str = "messages", sources: Sequence[int] = ()
) -> TokenizedDataset:
    """Returns a store of these units; unit i is line i + 1 of a file of its source, by default the only one."""
    sources = sources or [0] * len(units)
    reports = [SourceReport(f"source {number}", format_name) for number in range(max(sources) + 1)]
    files = [report.name for report in reports]
    with StoreWriter(folder) as writer:
        for number, (rows, source) in enumerate(zip(units, sources, strict=True)):
            hashes = tuple(1000 * number + index for index in range(len(rows)))
            writer.add([Entry(tuple(rows), hashes)], source, [(source, number + 1)])
            reports[source].count_used(rows, False)
        return writer.finish(files, reports)


def conversation_rows(rng: np.random.Generator, prefix: int, tails: Sequence[int], vocabulary: int = 97) -> list[Row]:
    """Returns rows that begin alike, the longest first, with different tails; tokens of the tails are trained, and some
    of those before, in the first row alone."""
    begin = rng.integers(2, vocabulary - 10, prefix).tolist()
    rows = []
    for number, tail in enumerate(sorted(tails, reverse=True)):
        # The first token of a tail differs, so that the rows share exactly the prefix.
        own = [vocabulary - 10 + number, *rng.integers(2, vocabulary - 10, tail - 1).tolist()]
        trained = [number == 0 and place % 3 == 0 for place in range(prefix)]
        rows.append(Row(begin + own, trained + [True] * tail))
    return rows
