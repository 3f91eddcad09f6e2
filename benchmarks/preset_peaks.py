"""The planned peak of every preset, compared with the comment in its file; no weights, no network, no GPU.

    PYTHONPATH=. python benchmarks/preset_peaks.py                    # every preset: planned, stated in its file, fits
                                                                      # 24 GiB or not
    PYTHONPATH=. python benchmarks/preset_peaks.py qwen3-8b-grpo ...  # some of them
    PYTHONPATH=. python benchmarks/preset_peaks.py --write --table    # writes the comments into presets/, prints
                                                                      # the table of docs/presets.md
    PYTHONPATH=. python benchmarks/preset_peaks.py --bits smollm3-3b-sft ...  # the table of docs/quantization.md: each
                                                                      # planned with its base in 4 and in 16 bits

Planned is the memory that the GPU needs: tensors at the highest point of the run (of a chain, of its worst stage), the
CUDA context and what the allocator cannot use. Returns 1 where a comment is off by more than 1 % or a preset does not
fit.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from lowrank_tune.config import Preset, find_preset, list_presets, load_any
from lowrank_tune.memory_planner import GIB
from lowrank_tune.memory_planner.planner import plan_of
from lowrank_tune.memory_planner.specs import simulation_specs

GPU_GIB = 24.0
WITHIN = 0.01
COMMENT = re.compile(r"^# Planned peak: .*\n", re.MULTILINE)
COLUMNS = ("sft", "text", "reward", "dpo", "kto", "grpo", "ppo", "preference", "rlvr", "rlhf")


def planned(name: str, *overrides: str) -> tuple[float, str]:
    """GiB that the GPU needs, and in which phase; of a chain, the stage and the phase."""
    # An adapter that another preset trains is planned as the stage below it: there is no run of it.
    below = load_any(name).to_dict().get("adapters", {}).get("sft", {}).get("path")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chain.yaml"
        if below:
            top = f"{{name: top, extends: {name}, adapters: {{sft: null}}}}"
            file.write_text(f"stages:\n- {{name: sft, extends: {Path(below).name}}}\n- {top}\n", encoding="utf-8")
        vram = round(GPU_GIB * GIB)
        plans = [
            plan_of(scene, vram, scene.recipe.name)
            for scene in simulation_specs(load_any(str(file) if below else name, *overrides), "cuda")
        ]
    worst = plans[-1] if below else max(plans, key=lambda one: one.needed)
    return worst.needed / GIB, f"{worst.name}, {worst.peak_phase.name}" if len(
        plans
    ) > 1 and not below else worst.peak_phase.name


def comment_of(gib: float, where: str) -> str:
    return f"# Planned peak: {gib:.1f} GiB ({where}); not yet measured on a GPU.\n"


def with_comment(text: str, comment: str) -> str:
    """The file with this line in place of the one that it has, or above everything but its first comment."""
    if COMMENT.search(text):
        return COMMENT.sub(lambda _: comment, text, count=1)
    body = next((place for place in re.finditer(r"^(?!#)", text, re.MULTILINE)), None)
    at = body.start() if body else 0
    return text[:at] + comment + text[at:]


def table(found: dict[str, float]) -> str:
    """Markdown: one row for each base, one column for each algorithm or chain."""
    rows: dict[str, dict[str, float]] = {}
    for name, gib in found.items():
        base, _, what = name.rpartition("-")
        rows.setdefault(base, {})[what] = gib
    lines = [f"| `NAME-` | {' | '.join(f'`{what}`' for what in COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    formatted = {
        base: [f"{cells[what]:.1f}" if what in cells else "" for what in COLUMNS] for base, cells in rows.items()
    }
    lines += [f"| `{base}` | {' | '.join(cells)} |" for base, cells in formatted.items()]
    return "\n".join(lines)


def print_bits_table(names: list[str]) -> None:
    """Markdown: the planned GiB of each preset with its base in 4 and in 16 bits."""
    print("| preset | base | 4 bits | 16 bits |\n|---|---|---|---|")
    for preset in wanted(names):
        peaks = [planned(preset.name, f"base.bits={bits}")[0] for bits in (4, 16)]
        cells = [f"{gib:.1f}" if gib <= GPU_GIB else f"{gib:.1f}: does not fit" for gib in peaks]
        print(f"| `{preset.name}` | `{preset.base}` | {' | '.join(cells)} |", flush=True)


def wanted(names: list[str]) -> list[Preset]:
    return [preset for preset in list_presets() if (preset.name in names if names else preset.billions)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PRESET", help="default: all except the tiny ones")
    parser.add_argument("--write", action="store_true", help="put the planned peak into the presets' files")
    parser.add_argument("--table", action="store_true", help="print the table of docs/presets.md")
    parser.add_argument("--bits", action="store_true", help="print the table of docs/quantization.md, nothing else")
    options = parser.parse_args(arguments)
    if options.bits:
        print_bits_table(options.names)
        return 0
    found: dict[str, float] = {}
    wrong = 0
    for preset in wanted(options.names):
        gib, where = planned(preset.name)
        found[preset.name] = gib
        if options.write:
            file = find_preset(preset.name)
            file.write_text(with_comment(file.read_text(encoding="utf-8"), comment_of(gib, where)), encoding="utf-8")
        stated = gib if options.write else preset.peak_gib
        off = stated is None or abs(stated - gib) > max(WITHIN * gib, 0.051)
        wrong += off or gib > GPU_GIB
        verdict = "does not fit" if gib > GPU_GIB else "off" if off else "ok"
        print(f"{preset.name:<24}{gib:6.2f} GiB planned ({where}), stated {stated}: {verdict}", flush=True)
    if options.table:
        print(table(found))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
