"""What was measured, in the terminal and as Markdown for docs/benchmarks.md."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_proof.records import Record

NOT_SHOWN = {"kind", "part", "side", "traceback", "kernels", "checks", "figures"}
CELL_SETTINGS = {"algorithm", "units", "micro", "length", "prompt", "group", "checkpointing", "offload", "optimizer"}
CELL_SETTINGS |= {"torch_compile", "without", "ragged"}
"""The fields of `cells.Cell`, which are in the name of a cell."""


def show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def title(record: Mapping[str, Any]) -> str:
    """Return the name of a record: its kind, and which one of it."""
    names = [record.get(name) for name in ("side", "fact", "cell", "algorithm", "step", "batch", "shape")]
    return f"{record['kind']} {next((str(name) for name in names[1:] if name is not None), '')}".strip()


def print_record(record: Mapping[str, Any]) -> None:
    kind, part = record["kind"], record.get("part")
    if kind == "machine":
        print(
            "; ".join(f"{name} {show(value)}" for name, value in record.items() if name != "kind" and value is not None)
        )
    elif kind == "part" and record["status"] == "started":
        print(f"\n== {part} (at most {record['limit_s']:.0f} s of {record['left_s']:.0f})")
    elif kind == "part" and record["status"] == "skipped":
        print(f"{part}: skipped, it needs up to {record['limit_s']:.0f} s and {record['left_s']:.0f} s are left")
    elif kind == "part":
        print(f"{part}: {record['status']} in {record['seconds']:.1f} s")
    elif kind == "failed":
        print(f"{part}: FAILED, {record['error']}")
        print("\n".join(record.get("traceback", [])), file=sys.stderr)
    else:
        print_figures(record)


def print_figures(record: Mapping[str, Any]) -> None:
    print(title(record) + (" (TRL)" if record.get("side") == "TRL" else ""))
    hidden = NOT_SHOWN | (CELL_SETTINGS if record["kind"] == "cell" else set())
    shown = {name: value for name, value in record.items() if name not in hidden and value is not None}
    for name, value in {**shown, **record.get("figures", {}), **record.get("checks", {})}.items():
        print(f"  {name:<44} {show(value):>16}")
    for kernel in record.get("kernels", []):
        print(f"  {1e3 * kernel['seconds']:>9.2f} ms {kernel['count']:>6}x  {kernel['name'][:100]}")


def markdown(records: Sequence[Record]) -> str:
    """Return the tables of one proof, one section for each kind of record."""
    by_kind: dict[str, list[Record]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    sections: list[str] = []
    if "machine" in by_kind:
        machine = by_kind["machine"][0]
        words = [f"{name} {show(value)}" for name, value in machine.items() if name != "kind" and value is not None]
        sections.append("; ".join(words) + ".")
    tables = {
        "cell": cell_table,
        "decode": decode_table,
        "decode_equality": equality_table,
        "profile": profile_tables,
        "checks": checks_table,
        "product": product_table,
        "fact": fact_table,
    }
    sections += [table(by_kind[kind]) for kind, table in tables.items() if kind in by_kind]
    sections.append(status_table(records))
    return "\n\n".join(sections) + "\n"


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def cell_table(records: Sequence[Record]) -> str:
    """Each cell of the kit beside TRL's figures of the same cell."""
    columns = ("planned_gib", "measured_gib", "plan_error", "update_tokens_per_second", "matmul_share")
    columns += ("rollout_tokens_per_second", "bandwidth_share", "seconds_per_step")
    trl = {record["cell"]: record for record in records if record["side"] == "TRL"}
    rows = []
    for record in records:
        if record["side"] == "TRL":
            continue
        figures = dict(record)
        if record.get("planned_gib") and record.get("measured_gib"):
            figures["plan_error"] = f"{record['measured_gib'] / record['planned_gib'] - 1:+.1%}"
        cells = [figure(figures, name) for name in columns]
        if "failed" in record:
            cells[1] = record["failed"]
        other = trl.get(record["cell"], {})
        peer = other.get("failed") or figure(other, "measured_gib")
        rows.append([record["cell"], record["base"], *cells, peer, figure(other, "seconds_per_step")])
    return markdown_table(["cell", "base", *columns, "TRL measured_gib", "TRL seconds_per_step"], rows)


def figure(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if name.endswith("_share"):
        return f"{value:.0%}"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def decode_table(records: Sequence[Record]) -> str:
    columns = ("mode", "batch", "width", "wall_ms_per_step", "busy_ms_per_step", "launches_per_step")
    columns += ("host_syncs_per_step", "tokens_per_second", "bandwidth_share", "replayed_steps")
    return markdown_table(columns, [[figure(record, name) for name in columns] for record in records])


def equality_table(records: Sequence[Record]) -> str:
    """Greedy completions by graphs beside those of single steps."""
    columns = ("base", "tokens", "replayed_steps", "equal_token_share", "largest_logp_difference")
    rows = []
    for record in records:
        distances = [show(difference["logp_distance"]) for difference in record["first_differences"]]
        rows.append([*(figure(record, name) for name in columns), ", ".join(distances)])
    return markdown_table([*columns, "log-prob distances of the first differing tokens"], rows)


def profile_tables(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        heading = (
            f"{record['cell']}, {record['base']}: {record['launches']:,} launches an update, {record['host_syncs']} "
            f"host synchronizations, GPU busy {record['busy_seconds']:.3f} of {record['wall_seconds']:.3f} s "
            f"({record['busy_share']:.0%})."
        )
        total = max(record["busy_seconds"], 1e-12)
        rows = []
        for kernel in record["kernels"]:
            share = f"{kernel['seconds'] / total:.1%}"
            rows.append(
                [
                    f"`{kernel['name'][:90]}`".replace("|", "/"),
                    str(kernel["count"]),
                    show(1e3 * kernel["seconds"]),
                    share,
                ]
            )
        parts.append(heading + "\n\n" + markdown_table(["kernel", "count", "ms", "share"], rows))
    return "\n\n".join(parts)


def checks_table(records: Sequence[Record]) -> str:
    columns = ("peak_gib", "update_tokens_per_second", "matmul_share", "rollout_tokens_per_second")
    rows = []
    for record in records:
        failed = [name for name, passed in record["checks"].items() if not passed]
        count = f"{len(record['checks']) - len(failed)} of {len(record['checks'])}"
        passed = count + (f" (not: {', '.join(failed)})" if failed else "")
        cells = [figure(record["figures"], name) for name in columns]
        rows.append([record["algorithm"], "yes" if record["checkpointing"] else "no", passed, *cells])
    return markdown_table(["", "recomputed", "checks passed", *columns], rows)


def product_table(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        hidden = {"kind", "part", "step", "checks", "traceback"}
        values = [f"{name} {show(value)}" for name, value in record.items() if name not in hidden]
        checks = [f"{name}: {show(passed)}" for name, passed in record.get("checks", {}).items()]
        rows.append([record["step"], "; ".join(values).replace("\n", " "), "; ".join(checks)])
    return markdown_table(["step", "figures", "checks"], rows)


def fact_table(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        hidden = {"kind", "part", "fact", "checks"}
        values = [
            f"{name} {show(value)}"
            for name, value in {**record, **record.get("checks", {})}.items()
            if name not in hidden
        ]
        rows.append([record["fact"], "; ".join(values).replace("|", "/")])
    return markdown_table(["fact", "values"], rows)


def status_table(records: Sequence[Record]) -> str:
    """Each part: done, skipped or failed, with its seconds or the reason."""
    rows = []
    for record in records:
        if record["kind"] == "skipped":
            rows.append([record["part"], "skipped", record["reason"]])
        elif record["kind"] == "failed":
            rows.append([record["part"], "failed", record["error"].splitlines()[0].replace("|", "/")])
        elif record["kind"] == "part" and record["status"] == "done":
            rows.append([record["part"], "done", f"{record['seconds']:.1f} s"])
        elif record["kind"] == "part" and record["status"] == "skipped":
            rows.append([record["part"], "skipped", f"needs {record['limit_s']:.0f} s, {record['left_s']:.0f} s left"])
    return markdown_table(["part", "status", ""], rows)
