"""The generated part of docs/presets.md: tables of all presets, from the preset files.

    PYTHONPATH=. python scripts/presets_table.py           # writes the page
    PYTHONPATH=. python scripts/presets_table.py --check   # returns 1 if the page is not up to date

Only the text between the two markers is generated; the text around it is written by hand. Peaks are those that the
preset files state; `benchmarks/preset_peaks.py` plans them and compares them.
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

from generated_part import update_page

from lowrank_tune.config import Chain, Preset, find_preset, list_presets, load_any

PAGE = Path(__file__).parent.parent / "docs" / "presets.md"
COLUMNS = ("sft", "text", "reward", "dpo", "kto", "grpo", "ppo", "preference", "rlvr", "rlhf")
GPU_SIZES_GIB = (8, 12, 16, 24)
ROUNDED_GIB = 0.05
"""The rounding error of a peak, as the files state one decimal."""
PEAK_PHASE = re.compile(r"^# Planned peak: [\d.]+ GiB \(([^)]*)\)", re.MULTILINE)


def base_table(presets: list[Preset]) -> str:
    """Returns the table of GiB by base and by algorithm or chain."""
    by_base: dict[str, dict[str, str]] = {}
    for preset in presets:
        base, _, what = preset.name.rpartition("-")
        by_base.setdefault(base, {})[what] = "" if preset.peak_gib is None else f"{preset.peak_gib:.1f}"
    lines = [f"| `NAME-` | {' | '.join(f'`{what}`' for what in COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [
        f"| `{base}` | {' | '.join(cells.get(what, '') for what in COLUMNS)} |" for base, cells in by_base.items()
    ]
    return "\n".join(lines)


def datasets_of(preset: Preset) -> str:
    """Returns the training data sets of a preset, each once, in the order of its stages."""
    loaded = load_any(preset.name)
    stages = loaded.stages if isinstance(loaded, Chain) else (loaded,)
    names = (source.dataset for stage in stages for source in stage.data.train)
    return ", ".join(f"`{name.rpartition('/')[2]}`" for name in dict.fromkeys(names))


def preset_tables(presets: list[Preset]) -> str:
    """Returns tables of every preset with its description and its data sets, one for each size of the base."""
    parts = []
    for group, members in groupby(presets, key=lambda preset: preset.group):
        lines = [f"### {group}", "", "| preset | what | data sets | GiB |", "|---|---|---|---|"]
        for preset in members:
            peak = "" if preset.peak_gib is None else f"{preset.peak_gib:.1f}"
            lines.append(f"| `{preset.name}` | {preset.description} | {datasets_of(preset)} | {peak} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def size_table(presets: list[Preset]) -> str:
    """Returns the table of presets by the smallest GPU that they fit.

    Only presets with their peak in an update are listed, as such a peak does not depend on the size of the GPU.
    """
    fixed = [preset for preset in presets if preset.peak_gib is not None and _peaks_in_update(preset)]
    lines = ["| GPU | presets that fit without a change, besides those of the rows above |", "|---|---|"]
    smaller = 0
    for size in GPU_SIZES_GIB:
        fitting = [preset.name for preset in fixed if smaller < (preset.peak_gib or 0.0) + ROUNDED_GIB <= size]
        lines.append(f"| {size} GB | {', '.join(f'`{name}`' for name in fitting) or 'none'} |")
        smaller = size
    return "\n".join(lines)


def _peaks_in_update(preset: Preset) -> bool:
    found = PEAK_PHASE.search(find_preset(preset.name).read_text(encoding="utf-8"))
    return found is not None and found[1].endswith("update")


def generated() -> str:
    """Returns the text between the markers."""
    presets = list_presets()
    large = [preset for preset in presets if preset.billions]
    return "\n\n".join(
        (
            "## Planned memory",
            base_table(large),
            "GiB of a 24 GiB GPU, as planned; of a chain its worst stage.",
            "## SFT, reward models, DPO and KTO by GPU memory",
            size_table(large),
            "## All presets",
            preset_tables(presets),
        )
    )


if __name__ == "__main__":
    sys.exit(update_page(PAGE, generated, __doc__))
