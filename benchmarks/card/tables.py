"""What was measured: as JSON lines, in the terminal, and as Markdown for RESULTS.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from card.smoke import Result

Record = dict[str, Any]


def write(file: str | None, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds a line for each record."""
    if file is not None:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)


def read(file: str) -> list[Record]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def show(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def print_machine(machine: Mapping[str, Any]) -> None:
    print("; ".join(f"{name} {show(value)}" for name, value in machine.items() if value is not None))


def print_result(result: Result) -> None:
    print(f"\n{result.algorithm}, checkpointing {'on' if result.checkpointing else 'off'}")
    for name, value in result.figures.items():
        print(f"  {name:<48} {show(value):>14}")
    for name, held in result.checks.items():
        print(f"  {name:<48} {'yes' if held else 'NO':>14}")


def markdown(records: Sequence[Record]) -> str:
    """The tables of a file of records, by shape; TRL's figures stand beside ours, whichever process they come from."""
    machines = {record["run"]: record for record in records if record["kind"] == "machine"}
    parts = []
    for shape in dict.fromkeys(machine["shape"] for machine in machines.values()):
        for kind, table in (("smoke", smoke_table), ("cell", cell_table)):
            mine = [record for record in records if record["kind"] == kind and machines[record["run"]]["shape"] == shape]
            if mine:
                told = {name: value for name, value in machines[mine[0]["run"]].items() if name not in ("kind", "run", "what", "shape")}
                words = [f"{name} {show(value)}" for name, value in told.items() if value is not None]
                parts += [f"{shape}, NF4, random weights; {'; '.join(words)}.", table(mine)]
    return "\n\n".join(parts) + "\n"


def smoke_table(records: Sequence[Record]) -> str:
    lines = ["| | checkpointing | checks held | peak GiB | tokens/s | share of roof |", "|---|---|---|---|---|---|"]
    for record in records:
        figures, checks = record["figures"], record["checks"]
        broken = [name for name, held in checks.items() if not held]
        held = f"{len(checks) - len(broken)} of {len(checks)}" + (f" (not: {', '.join(broken)})" if broken else "")
        lines.append(f"| {record['algorithm']} | {'on' if record['checkpointing'] else 'off'} | {held} | "
                     + " | ".join(figure(figures, name) for name in ("peak GiB", "tokens a second", "share of the roof")) + " |")  # fmt: skip
    return "\n".join(lines)


def cell_table(records: Sequence[Record]) -> str:
    """Ours, and TRL's record of the same cell behind it."""
    heading = ["cell", "planned GiB", "measured GiB", "off", "update tokens/s", "share of roof", "rollout tokens/s", "s a step", "TRL: GiB",
               "TRL: s a step"]  # fmt: skip
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    theirs = {record["cell"]: record for record in records if record.get("side") == "TRL"}
    for record in (record for record in records if record.get("side") != "TRL"):
        other = theirs.get(record["cell"], {})
        if "failed" in record:
            lines.append(f"| {record['cell']} | {figure(record, 'planned GiB')} | {record['failed']} | | | | | | | |")
            continue
        off = f"{record['measured GiB'] / record['planned GiB'] - 1:+.1%}" if record.get("planned GiB") else ""
        cells = [record["cell"], figure(record, "planned GiB"), figure(record, "measured GiB"), off, figure(record, "update tokens/s"),
                 f"{record['share of roof']:.0%}", figure(record, "rollout tokens/s"), figure(record, "seconds a step"),
                 "out of memory" if "failed" in other else figure(other, "measured GiB"), figure(other, "seconds a step")]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    return f"{value:.0%}" if name.startswith("share") else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
