"""The proof within its time: a part that raises, hangs or kills its process costs only itself, and records survive a
kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_proof_helpers import FOLDER, ROOT, module, modules

slow = pytest.mark.slow
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

WORKER = """
import json, os, signal, subprocess, sys, time
path, plan, names, deadline = sys.argv[1:5]
plan = json.loads(plan)
def write(**record):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\\n")
print(os.getpid())
for name in names.split(","):
    action = plan.get(name, "done")
    if action == "slow start":
        time.sleep(60)
    if action == "orphan":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", path + ".orphan"])
    if action == "no start":
        sys.exit(7)
    write(kind="part", part=name, status="started", time=time.time(), limit_s=0.5)
    if action == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "half a line":
        with open(path, "a") as file:
            file.write('{"kind": "ce')
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hangs":
        time.sleep(60)
    if action == "raises":
        write(kind="failed", part=name, error="RuntimeError: x")
        sys.exit(3)
    write(kind="cell", part=name)
    write(kind="part", part=name, status="done", seconds=0.1)
"""
"""A worker that needs no torch. `plan` assigns an action to each part."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    yield from modules()


def parts(*names: str, isolated: Sequence[str] = (), limit_s: float = 0.5) -> list[Any]:
    part = module("parts").Part
    return [part(name, lambda context: iter(()), limit_s, limit_s, isolated=name in isolated) for name in names]


def command(path: Path, plan: dict[str, str], started: list[list[str]]) -> Callable[..., list[str]]:
    def words(group: Sequence[Any], deadline: float) -> list[str]:
        names = [part.name for part in group]
        started.append(names)
        return [sys.executable, "-c", WORKER, str(path), json.dumps(plan), ",".join(names), str(deadline)]

    return words


def supervise(
    path: Path, plan: dict[str, str], selected: list[Any], seconds: float = 30.0
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the parts that each worker was started with, and the records."""
    started: list[list[str]] = []
    supervisor = module("supervisor").Supervisor(path, command(path, plan, started), time.time() + seconds, tiny=False)
    supervisor.run(selected)
    return started, module("records").read(path)


def outcome(records: list[dict[str, Any]]) -> dict[str, str]:
    """Return part -> done, skipped, or the error."""
    result = {}
    for record in records:
        if record["kind"] == "failed":
            result[record["part"]] = record["error"]
        elif record["kind"] == "part" and record["status"] != "started":
            result[record["part"]] = record["status"]
    return result


# --- the supervisor ---------------------------------------------------------------------------------------------------


def test_parts_share_a_process_unless_one_is_isolated(gpu: ModuleType, tmp_path: Path) -> None:
    started, records = supervise(tmp_path / "r", {}, parts("a", "b", "c", "d", "e", isolated=["c"]))
    assert started == [["a", "b"], ["c"], ["d", "e"]]
    assert outcome(records) == dict.fromkeys("abcde", "done")


@pytest.mark.parametrize(
    ("action", "error", "workers"),
    [
        ("raises", "RuntimeError: x", [["a", "b", "c"], ["c"]]),
        ("dies", "the worker ended with SIGKILL", [["a", "b", "c"], ["c"]]),
        ("half a line", "the worker ended with SIGKILL", [["a", "b", "c"], ["c"]]),
        ("hangs", "it exceeded its time limit", [["a", "b", "c"], ["c"]]),
        (
            "no start",
            "the worker ended with exit code 7 before it started this part",
            [["a", "b", "c"], ["b", "c"], ["c"]],
        ),
    ],
)
def test_failed_part_does_not_stop_the_others(
    gpu: ModuleType, tmp_path: Path, action: str, error: str, workers: list[list[str]]
) -> None:
    started, records = supervise(tmp_path / "r", {"b": action}, parts("a", "b", "c"))
    assert started == workers
    assert outcome(records) == {"a": "done", "b": error, "c": "done"}
    assert [record["part"] for record in records if record["kind"] == "cell"] == ["a", "c"]


def test_workers_that_never_start_a_part_end_the_proof(gpu: ModuleType, tmp_path: Path) -> None:
    started, records = supervise(tmp_path / "r", dict.fromkeys("abc", "no start"), parts("a", "b", "c"))
    assert started == [["a", "b", "c"], ["b", "c"], ["c"]] and len(outcome(records)) == 3


def test_a_part_is_not_started_without_its_time(gpu: ModuleType, tmp_path: Path) -> None:
    """One that needs more than is left is skipped, and a smaller one after it still runs."""
    selected = [*parts("a"), *parts("large", isolated=["large"], limit_s=100.0), *parts("c")]
    started, records = supervise(tmp_path / "r", {}, selected, seconds=20.0)
    assert started == [["a"], ["c"]] and outcome(records) == {"a": "done", "large": "skipped", "c": "done"}


def test_the_proof_ends_in_time_and_so_do_its_processes(gpu: ModuleType, tmp_path: Path) -> None:
    start = time.time()
    started, records = supervise(tmp_path / "r", {"a": "hangs"}, parts("a", "b", limit_s=1.5), seconds=2.7)
    assert time.time() - start < 10 and started == [["a", "b"]]
    assert outcome(records)["a"] in ("the time budget was spent", "it exceeded its time limit")


def test_time_that_ends_while_a_worker_starts_skips_its_parts(gpu: ModuleType, tmp_path: Path) -> None:
    started, records = supervise(tmp_path / "r", {"a": "slow start"}, parts("a", "b"), seconds=1.6)
    assert started == [["a", "b"]] and outcome(records) == {"a": "skipped", "b": "skipped"}


def test_children_of_a_worker_that_has_ended_are_ended(gpu: ModuleType, tmp_path: Path) -> None:
    """The commands of `product`, after an error in that part."""
    started, records = supervise(tmp_path / "r", {"a": "orphan"}, parts("a"))
    assert outcome(records) == {"a": "done"}
    deadline = time.time() + 10
    while time.time() < deadline and processes_with(f"{tmp_path / 'r'}.orphan"):
        time.sleep(0.05)
    assert processes_with(f"{tmp_path / 'r'}.orphan") == []


def test_an_interrupt_ends_the_worker(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = module("supervisor")
    workers = []
    popen = subprocess.Popen

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    def remembered(*args: Any, **kwargs: Any) -> Any:
        workers.append(popen(*args, **kwargs))
        return workers[-1]

    monkeypatch.setattr(supervisor.subprocess, "Popen", remembered)
    monkeypatch.setattr(supervisor.Supervisor, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        supervise(tmp_path / "r", {"a": "hangs"}, parts("a"))
    assert workers[0].poll() == -signal.SIGKILL


# --- records ----------------------------------------------------------------------------------------------------------


def test_records_survive_a_line_that_was_cut_off(gpu: ModuleType, tmp_path: Path) -> None:
    records, path = module("records"), tmp_path / "r"
    records.append(path, {"kind": "a", "value": float("nan")})
    with path.open("a") as file:
        file.write('{"kind": "b", "va')
    assert [record["kind"] for record in records.read(path)] == ["a"]
    tail = records.Tail(path)
    records.append(path, {"kind": "c"})
    records.append(None, {"kind": "nowhere"})
    assert [record["kind"] for record in records.read(path)] == ["a", "c"]
    assert [record["kind"] for record in tail.new()] == ["c"] and tail.new() == []
    assert records.Tail(tmp_path / "absent").new() == []


# --- the worker -------------------------------------------------------------------------------------------------------


def worker(path: Path, selected: list[Any], seconds: float = 60.0, **context: Any) -> Any:
    machine = {"kind": "machine", "shape": "tiny"}
    known = {"tiny": True, "has_base": True, "device": torch.device("cpu"), "machine": machine, "base_record": None}
    return module("worker").Worker(SimpleNamespace(**{**known, **context}), selected, path, time.time() + seconds, 1.0)


def part_of(name: str, records: Sequence[Any], needs_base: bool = False, limit_s: float = 1.0) -> Any:
    """A part that yields these records; an exception among them is raised."""

    def run(context: Any) -> Iterator[Any]:
        for record in records:
            if isinstance(record, Exception):
                raise record
            yield record

    return module("parts").Part(name, run, limit_s, limit_s, needs_base=needs_base)


def test_a_part_that_raises_keeps_its_records_and_ends_the_process(gpu: ModuleType, tmp_path: Path) -> None:
    """The base may be left with adapters in it: the rest gets a process of its own."""
    path = tmp_path / "r"
    selected = [part_of("a", [{"kind": "cell"}]), part_of("b", [{"kind": "cell"}, RuntimeError("x")]), part_of("c", [])]
    assert worker(path, selected).run() == module("worker").BROKEN_DEVICE
    records = module("records").read(path)
    assert outcome(records) == {"a": "done", "b": "RuntimeError: x"} and records[0]["kind"] == "machine"
    assert [record["part"] for record in records if record["kind"] == "cell"] == ["a", "b"]
    assert any("raise record" in line for line in records[-1]["traceback"])


def test_a_worker_skips_what_does_not_fit(gpu: ModuleType, tmp_path: Path) -> None:
    """The base counts where it is not built yet."""
    path = tmp_path / "r"
    selected = [part_of("large", [], limit_s=90.0), part_of("base", [], needs_base=True, limit_s=8.0), part_of("c", [])]
    assert worker(path, selected, seconds=10.0, has_base=False).run() == 0
    assert outcome(module("records").read(path)) == {"large": "skipped", "base": "skipped", "c": "done"}


def test_a_broken_device_ends_the_process(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("worker"), "is_usable", lambda device: False)
    assert worker(tmp_path / "r", [part_of("a", []), part_of("b", [])]).run() == module("worker").BROKEN_DEVICE
    assert outcome(module("records").read(tmp_path / "r")) == {"a": "done"}


# --- the real thing ---------------------------------------------------------------------------------------------------

BROKEN = """
import dataclasses, os, signal, sys, time
sys.path.insert(0, {folder!r})
import gpu
from gpu_proof import parts
gpu.SCRIPT = __import__("pathlib").Path(__file__)
def raising(context):
    yield {{"kind": "fact", "fact": "before the error"}}
    raise RuntimeError("broken on purpose")
def dying(context):
    yield {{"kind": "fact", "fact": "before the kill"}}
    os.kill(os.getpid(), signal.SIGKILL)
def hanging(context):
    yield {{"kind": "fact", "fact": "before the hang"}}
    time.sleep(600)
for index, part in enumerate(parts.PARTS):
    run = {{"decode": raising, "grpo": dying, "ppo": hanging}}.get(part.name)
    if run is not None:
        part = dataclasses.replace(part, run=run, tiny_limit_s=3.0)
        parts.PARTS = (*parts.PARTS[:index], part, *parts.PARTS[index + 1:])
        parts.BY_NAME[part.name] = part
gpu.PARTS = parts.PARTS
sys.exit(gpu.main(sys.argv[1:]))
"""


@slow
def test_a_proof_with_broken_parts(gpu: ModuleType, tmp_path: Path) -> None:
    """Real parts beside one that raises, one that kills its process, and one that hangs."""
    script, path = tmp_path / "broken_gpu.py", tmp_path / "r.jsonl"
    script.write_text(BROKEN.format(folder=str(FOLDER)))
    words = [
        sys.executable,
        str(script),
        "proof",
        "--tiny",
        "--json",
        str(path),
        "--seconds",
        "600",
        "--limit-factor",
        "4",
    ]
    selected = "facts,sft,decode,oom,grpo,ppo,dpo"
    done = subprocess.run(
        [*words, "--parts", selected], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=500
    )
    records = module("records").read(path)
    assert done.returncode == 1 and "NOT every check passed" in done.stdout, done.stdout + done.stderr
    expected = dict.fromkeys(selected.split(","), "done")
    expected |= {"decode": "RuntimeError: broken on purpose", "ppo": "it exceeded its time limit"}
    assert outcome(records) == expected | {"grpo": "the worker ended with SIGKILL"}
    before = [record["fact"] for record in records if record["kind"] == "fact" and "before" in record["fact"]]
    assert before == ["before the error", "before the kill", "before the hang"]
    assert [record["algorithm"] for record in records if record["kind"] == "checks"] == ["oom", "dpo"]


@slow
def test_a_killed_proof_keeps_its_records_and_leaves_no_process(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    words = [sys.executable, str(FOLDER / "gpu.py"), "proof", "--tiny", "--json", str(path), "--limit-factor", "4"]
    words += ["--parts", "facts,sft,decode,oom,grpo,ppo,dpo,reward,cells"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd=tmp_path
    ) as proof:
        deadline = time.time() + 200
        while time.time() < deadline and "decode" not in finished(path):
            time.sleep(0.05)
        proof.kill()
    done = finished(path)
    assert done[:3] == ["facts", "sft", "decode"] and "cells" not in done
    deadline = time.time() + 20
    while time.time() < deadline and processes_with(str(path)):
        time.sleep(0.2)
    assert processes_with(str(path)) == []


def finished(path: Path) -> list[str]:
    records = module("records").read(path) if path.exists() else []
    return [record["part"] for record in records if record.get("status") == "done"]


def processes_with(argument: str) -> list[str]:
    """Return the command lines of processes that contain this text."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = process.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if argument in text:
            found.append(text)
    return found


@slow
def test_a_proof_of_sixty_seconds_ends_in_time(gpu: ModuleType, tmp_path: Path) -> None:
    path, start = tmp_path / "r.jsonl", time.time()
    words = [sys.executable, str(FOLDER / "gpu.py"), "proof", "--tiny", "--seconds", "60", "--json", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=150)
    seconds = time.time() - start
    records = module("records").read(path)
    # The proof measures its time from its own start: imports of torch before it count for the reader, not for it.
    assert seconds < 60 + 15 and " of 16 parts in " in done.stdout, done.stdout
    names = [part.name for part in module("parts").PARTS]
    assert list(outcome(records)) and set(outcome(records)) == set(names)
    assert outcome(records)["facts"] == "done" and outcome(records)["product"] == "skipped"
