"""Atomic checkpoints and the run folder: a kill at every system call, every kind of corruption, full disks, exact round
trips."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_summaries import DONE_CHAIN, DONE_SUMMARY
from torch import Tensor

from lowrank_tune import checkpoint
from lowrank_tune.checkpoint import (
    CorruptCheckpoint,
    RunFolder,
    Snapshot,
    latest_checkpoint,
    load,
    rotate,
    write_atomically,
)
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import Event, LogMessage
from lowrank_tune.manifest import content_hash, manifest_bytes

FILES = (
    "policy/adapter_model.safetensors",
    "optimizer.safetensors",
    "policy/adapter_config.json",
    "state.json",
    "manifest.json",
)


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {name: {"a": torch.randn(40, 40, generator=generator), "b": torch.arange(step)} for name in FILES[:2]}
    return Snapshot(
        tensors, {"policy/adapter_config.json": {"r": step}, "state.json": {"step": step, "loss": 0.1 * step}}
    )


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit, types too."""
    if isinstance(one, Tensor):
        raw = [t.reshape(-1).contiguous().view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or one != one and other != other)


def equal(one: Snapshot, other: Snapshot) -> bool:
    def ordered(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: dict(sorted(values[key].items())) if isinstance(values[key], dict) else values[key]
            for key in sorted(values)
        }

    return same(ordered(one.tensors), ordered(other.tensors)) and same(ordered(one.documents), ordered(other.documents))


def silent(event: Event) -> None:
    raise AssertionError(f"no event is expected: {event}")


def event_recorder() -> tuple[list[Event], Callable[[Event], None]]:
    events: list[Event] = []
    return events, events.append


def count_calls(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], Any]) -> list[str]:
    """Calls `act` before call number `at` of os.write, os.fsync and os.replace. Returns a list that records the names
    of all calls."""
    seen: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 == at:
                act()
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "fsync", "replace"):
        wrap(name)
    return seen


def calls_of_a_save(tmp_path: Path, again: bool = False) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        if again:
            write_atomically(tmp_path / "count" / "step-2", snapshot(1))
        seen = count_calls(patch, -1, lambda: None)
        write_atomically(tmp_path / "count" / "step-2", snapshot(2))
        return list(seen)


def test_write_then_load_returns_the_same_snapshot(tmp_path: Path) -> None:
    target = write_atomically(tmp_path / "new" / "step-3", snapshot(3))
    assert equal(load(target), snapshot(3))
    assert not equal(load(target), snapshot(4))
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()) == sorted(FILES)
    (target / "extra.json").write_text("{}")  # decides nothing
    assert equal(load(target), snapshot(3))


@pytest.mark.parametrize("again", [False, True])
def test_write_atomically_killed_at_any_call_leaves_a_valid_checkpoint(tmp_path: Path, again: bool) -> None:
    """os._exit in a forked child at each write, fsync and rename; `again`: step-2 is there already and is replaced."""
    calls = calls_of_a_save(tmp_path, again)
    assert len(calls) == (15 if again else 14)
    for at in range(len(calls)):
        folder = tmp_path / str(at)
        write_atomically(folder / "step-1", snapshot(1))
        if again:
            write_atomically(folder / "step-2", Snapshot({}, {"state.json": "old"}))
        child = os.fork()
        if child == 0:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    count_calls(patch, at, lambda: os._exit(7))
                    write_atomically(folder / "step-2", snapshot(2))
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        found = latest_checkpoint(folder, silent)
        assert found is not None
        step, content = found
        named = at == len(calls) - 1  # only the fsync of the parent was missing
        old = Snapshot({}, {"state.json": "old"}) if again else snapshot(1)
        assert step == (2 if named or again else 1)
        assert equal(content, snapshot(2) if named else old)
        assert sorted(path.name for path in folder.iterdir()) == (
            ["step-1", "step-2"] if named or again else ["step-1"]
        )


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_write_atomically_with_a_failing_call_changes_nothing(tmp_path: Path, number: int, again: bool) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    folder = tmp_path / "checkpoints"
    for step in (1, 2) if again else (1,):
        write_atomically(folder / f"step-{step}", snapshot(1))
    for at in range(len(calls_of_a_save(tmp_path, again)) - 1):
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, at, fail)
            with pytest.raises(UserError) as caught:
                write_atomically(folder / "step-2", snapshot(2))
        assert isinstance(caught.value, TrainingError) == (number in (errno.ENOSPC, errno.EIO))
        words = {
            errno.ENOSPC: "the disk is full",
            errno.EACCES: "permission denied",
            errno.EROFS: "read-only",
            errno.EIO: "error",
        }
        assert words[number] in str(caught.value) and "step-2" in str(caught.value) and "\n" not in str(caught.value)
        assert sorted(path.name for path in folder.iterdir()) == (["step-1", "step-2"] if again else ["step-1"]), at
        assert all(equal(load(path), snapshot(1)) for path in folder.iterdir())


def test_write_atomically_above_the_file_size_limit_changes_nothing(tmp_path: Path) -> None:
    """No hook here: RLIMIT_FSIZE cuts a real write short."""
    write_atomically(tmp_path / "step-1", snapshot(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(TrainingError, match="step-2: the limit on the size of a file is reached"):
            write_atomically(tmp_path / "step-2", snapshot(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert equal(load(tmp_path / "step-1"), snapshot(1))


def test_write_atomically_interrupted_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    count_calls(monkeypatch, 5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "step-2", snapshot(2))
    assert not list(tmp_path.iterdir())


def test_write_atomically_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="did not write"):
        write_atomically(tmp_path / "final", snapshot(1))
    assert (tmp_path / "final" / "thesis.txt").read_text() == "precious"


def corruptions(data: bytes, other: bytes, draw: random.Random) -> Iterator[tuple[str, bytes | None]]:
    yield "delete", None
    yield "empty", b""
    for _ in range(4):
        yield "truncate", data[: draw.randrange(len(data))]
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        yield "flip", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    yield "append", data + b" "
    start = draw.randrange(len(data))
    yield "zeros", data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]
    yield "swap", other


@pytest.mark.parametrize("name", FILES)
def test_load_finds_every_corruption(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    one, two = (write_atomically(tmp_path / f"step-{step}", snapshot(step)) for step in (1, 2))
    good = (two / name).read_bytes()
    for what, bad in corruptions(good, (one / name).read_bytes(), draw):
        assert bad != good
        if bad is None:
            (two / name).unlink()
        else:
            (two / name).write_bytes(bad)
        with pytest.raises(CorruptCheckpoint):
            load(two)
        events, emit = event_recorder()
        found = latest_checkpoint(tmp_path, emit)
        assert found is not None and found[0] == 1 and equal(found[1], snapshot(1)), what
        assert len(events) == 1 and isinstance(events[0], LogMessage) and events[0].level == "warning"
        assert "step-2 is broken" in events[0].message and "broken-step-2" in events[0].message
        shutil.rmtree(tmp_path / "broken-step-2")
        write_atomically(two, snapshot(2))
        assert latest_checkpoint(tmp_path, silent) is not None


def test_quarantine_takes_free_names_and_a_renamed_step_is_broken(tmp_path: Path) -> None:
    write_atomically(tmp_path / "step-1", snapshot(1))
    for name in ("step-7", "step-8"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken-step-8").mkdir()
    shutil.copytree(tmp_path / "step-1", tmp_path / "step-9")  # whole, but not step 9
    (tmp_path / "step-010").mkdir()  # not our spelling
    (tmp_path / ".tmp-step-3-00").mkdir()
    (tmp_path / ".tmp-state.json-00").write_text("x")
    events, emit = event_recorder()
    found = latest_checkpoint(tmp_path, emit)
    assert found is not None and found[0] == 1 and len(events) == 3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["broken-step-7", "broken-step-8", "broken-step-8-2", "broken-step-9", "step-010", "step-1"]
    assert latest_checkpoint(tmp_path / "absent", silent) is None


def rewritten(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_bytes(manifest_bytes({**json.loads(path.read_bytes()), **changes}))


def test_newer_version_is_not_quarantined(tmp_path: Path) -> None:
    rewritten(write_atomically(tmp_path / "step-1", snapshot(1)), version=99)
    with pytest.raises(UserError, match="another version") as caught:
        latest_checkpoint(tmp_path, silent)
    assert not isinstance(caught.value, CorruptCheckpoint)
    assert (tmp_path / "step-1").exists()


def test_load_refuses_names_outside_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("1")
    for name in ("../secret.json", str(tmp_path / "secret.json")):
        target = write_atomically(tmp_path / "step-1", snapshot(1))
        rewritten(target, files={name: {"size": 1, "blake2b": content_hash(b"1")}})
        with pytest.raises(CorruptCheckpoint, match="outside"):
            load(target)


def test_rotate_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 10, 9, 4):
        write_atomically(tmp_path / f"step-{step}", snapshot(1))
    (tmp_path / "step-1").mkdir()  # no manifest: not ours
    rotate(tmp_path, keep=2, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-10", "step-2", "step-9"]
    rotate(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-10"]


@pytest.mark.parametrize("best", [None, 1, 4])
@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5])
def test_after_each_save_the_newest_remain_and_the_best(tmp_path: Path, keep: int, best: int | None) -> None:
    """Of k saves exactly min(k, keep), the newest, and beside them the best."""
    for step in range(1, 8):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "manifest.json").touch()
        rotate(tmp_path, keep, best)
        wanted = {*range(max(1, step - keep + 1), step + 1), *([best] if best is not None and best <= step else [])}
        assert {path.name for path in tmp_path.iterdir()} == {f"step-{kept}" for kept in wanted}


def test_rotate_killed_while_deleting_leaves_no_partial_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        write_atomically(tmp_path / f"step-{step}", snapshot(step))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (path / "manifest.json").unlink())
    rotate(tmp_path, keep=2)
    monkeypatch.undo()
    assert (
        latest_checkpoint(tmp_path, silent) is not None
    )  # a half deleted step-1 would be told as broken once 2 and 3 are gone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.int8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
    size = int(numpy.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(FILES[:2]), st.dictionaries(NAMES, tensors(), max_size=3)),
    st.dictionaries(st.just("state.json"), JSON),
)
def test_any_snapshot_round_trips(
    tmp_path: Path, tensors: dict[str, dict[str, Tensor]], documents: dict[str, Any]
) -> None:
    target = write_atomically(tmp_path / "step-1", Snapshot(tensors, documents))
    assert equal(load(target, "step-1"), Snapshot(tensors, documents))


def test_views_and_shared_storage_round_trip(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    given = {"whole": whole, "column": whole[:, 1], "turned": whole.T, "wide": whole[0].expand(2, 4)}
    found = load(write_atomically(tmp_path / "step-1", Snapshot({"a.safetensors": given})))
    assert all(torch.equal(found.tensors["a.safetensors"][name], tensor) for name, tensor in given.items())
    found.tensors["a.safetensors"]["whole"].add_(1)  # writable, and alone
    assert torch.equal(found.tensors["a.safetensors"]["column"], whole[:, 1])


def through_disk(
    tmp_path: Path, tensors: dict[str, Tensor], document: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found = load(write_atomically(tmp_path / "step-1", Snapshot({"x.safetensors": tensors}, {"x.json": document})))
    return found.tensors["x.safetensors"], found.documents["x.json"]


@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"foreach": True, "amsgrad": True}, {"lr": torch.tensor(1e-3)}]
)
def test_restored_adamw_continues_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    names = ["layer.10.A", "layer.9.A", "head"]

    def start(order: list[str]) -> tuple[dict[str, Tensor], torch.optim.AdamW]:
        weights = {name: torch.full((2, i + 1), 0.5, requires_grad=True) for i, name in enumerate(names)}
        groups: list[dict[str, Any]] = [
            {"params": [weights[name] for name in order if name != "head"]},
            {"params": [weights["head"]], "weight_decay": 0.0},
        ]
        return weights, torch.optim.AdamW(groups, **options)

    def step(weights: dict[str, Tensor], optimizer: torch.optim.AdamW, seed: int) -> None:
        for i, name in enumerate(names):
            if name != "head" or seed > 1:  # the head has no state yet when it is saved
                weights[name].grad = torch.randn(2, i + 1, generator=torch.Generator().manual_seed(seed + i))
        optimizer.step()

    weights, optimizer = start(names)
    step(weights, optimizer, 1)
    saved = through_disk(tmp_path, *checkpoint.flatten_optimizer(optimizer.state_dict(), names))
    assert same(checkpoint.restore_optimizer(*saved, names), optimizer.state_dict())
    order = ["layer.9.A", "layer.10.A", "head"]  # another order of the parameters: the names decide
    other_weights, other = start(order)
    with torch.no_grad():
        for name in names:
            other_weights[name].copy_(weights[name])
    other.load_state_dict(checkpoint.restore_optimizer(*saved, order))
    for seed in (2, 3):
        step(weights, optimizer, seed)
        step(other_weights, other, seed)
    assert all(torch.equal(weights[name], other_weights[name]) for name in names)
    assert not torch.equal(weights["layer.9.A"], torch.full((2, 2), 0.5))


def test_nested_optimizer_states_round_trip(tmp_path: Path) -> None:
    code = torch.linspace(-1, 1, 256)
    entry = {
        "step": 3,
        "state1": torch.arange(8, dtype=torch.uint8),
        "qmap1": code,
        "absmax1": torch.tensor([float("nan"), 0.1]),
        "nested": {"none": None, "pair": (1, (2.5, "x")), "list": [torch.tensor(1.0), True, {}]},
    }
    group = {"params": [0, 1], "lr": 0.1 + 0.2, "betas": (0.9, 0.999), "eps": 1e-8, "inf": float("inf"), "alpha": None}
    state = {"more": [1, {"tensor": "x"}], "state": {0: entry, 1: {**entry, "qmap1": code}}, "param_groups": [group]}
    saved = through_disk(tmp_path, *checkpoint.flatten_optimizer(state, ["a", "b"]))
    assert same(dict(sorted(checkpoint.restore_optimizer(*saved, ["a", "b"]).items())), dict(sorted(state.items())))
    with pytest.raises(UserError, match="other parameters: 2 differ, `b`"):
        checkpoint.restore_optimizer(*saved, ["a", "c"])
    with pytest.raises(TypeError, match="group/0/bad: cannot save a object"):
        checkpoint.flatten_optimizer({"state": {}, "param_groups": [{"params": [0], "bad": object()}]}, ["a"])


def test_saving_draws_no_random_number(tmp_path: Path) -> None:
    def rng_states() -> list[Any]:
        state: Any = numpy.random.get_state(legacy=False)
        return [random.getstate(), state["state"]["key"].tolist(), state["state"]["pos"], torch.get_rng_state()]

    before = rng_states()
    write_atomically(tmp_path / "step-1", snapshot(1))
    assert same(before, rng_states())


# The run folder

RECIPE = {"steps": 10, "rate": 0.1}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in new if key != "steps" and old.get(key) != new[key]]


def begin(
    path: Path, recipe: dict[str, Any] = RECIPE, emit: Callable[[Event], None] = silent, exact: bool = False
) -> RunFolder:
    return RunFolder.open(path, recipe, f"rate: {recipe['rate']}\n", differences, exact, emit)


def finish(folder: RunFolder) -> None:
    folder.write_json("summary.json", {**DONE_SUMMARY, "best": float("nan")})
    folder.close()


def test_unfinished_run_is_continued(tmp_path: Path) -> None:
    with begin(tmp_path / "runs" / "demo") as folder:
        assert not folder.continued and folder.path.name == "demo"
        assert (folder.path / "recipe.yaml").read_text() == "rate: 0.1\n"
        assert folder.checkpoint(3) == folder.checkpoints / "step-3"
        folder.write_json("summary.json", {"status": "interrupted"})
        (folder.path / ".tmp-junk").mkdir()
    with begin(tmp_path / "runs" / "demo", {**RECIPE, "steps": 20}) as folder:  # allowed by `differences`
        assert folder.continued and folder.path.name == "demo"
        assert json.loads((folder.path / "run.json").read_text())["recipe"]["steps"] == 20
        assert not (folder.path / ".tmp-junk").exists()


@pytest.mark.parametrize("exact", [False, True])
def test_finished_run_is_left_alone(tmp_path: Path, exact: bool) -> None:
    finish(begin(tmp_path / "demo"))
    (tmp_path / "demo-2").mkdir()
    (tmp_path / "demo-2" / "mine.txt").write_text("x")  # taken by something else
    before = {path: path.read_bytes() for path in (tmp_path / "demo").iterdir()}
    events, emit = event_recorder()
    folder = begin(tmp_path / "demo", emit=emit, exact=exact)
    assert folder.path.name == "demo-3" and not folder.continued
    assert (
        isinstance(events[0], LogMessage)
        and events[0].level == ("warning" if exact else "info")
        and "demo-3" in events[0].message
    )
    folder.close()
    # a run without checkpoints can start again with another recipe
    with begin(tmp_path / "demo", {**RECIPE, "rate": 0.3}, emit=emit) as folder:
        assert folder.path.name == "demo-3" and folder.continued
    with begin(tmp_path / "demo", emit=emit) as folder:
        folder.checkpoint(1).mkdir(parents=True)
    with pytest.raises(
        UserError,
        match="demo-3 contains an unfinished run of another recipe:\n  rate: 0.1 -> 0.2\nGive .*--out, or delete",
    ):
        begin(tmp_path / "demo", {**RECIPE, "rate": 0.2}, emit=emit)
    assert before == {path: path.read_bytes() for path in (tmp_path / "demo").iterdir()}
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["best"] is None


def test_a_run_that_finishes_as_its_lock_is_taken_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes its summary and releases the lock after the folder was looked at and before it is
    locked here."""
    demo = tmp_path / "demo"
    begin(demo).close()
    before, lock = (demo / "run.json").read_bytes(), fcntl.flock

    def finished_meanwhile(descriptor: int, operation: int) -> None:
        if not (demo / "summary.json").exists():
            (demo / "summary.json").write_text(json.dumps(DONE_SUMMARY))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    with begin(demo, {**RECIPE, "steps": 20}, emit=event_recorder()[1]) as folder:
        assert folder.path.name == "demo-2" and not folder.continued
        assert (demo / "run.json").read_bytes() == before
        descriptor = os.open(demo / ".lock", os.O_RDWR)
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the finished run is locked no more
        os.close(descriptor)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"status": "done"}', "its status is `done`, and these fields are missing or invalid: algorithm, seconds, "),
        (json.dumps({**DONE_SUMMARY, "warnings": None}), "missing or invalid: warnings)"),
        (json.dumps({**DONE_SUMMARY, "steps": "9"}), "missing or invalid: steps)"),
        (json.dumps({**DONE_CHAIN, "stages": {}}), "missing or invalid: stages)"),
        ("{", "it is not valid JSON"),
        ("[]", "it is not a JSON object"),
    ],
)
def test_a_damaged_summary_is_not_that_of_a_finished_run(tmp_path: Path, content: str, problem: str) -> None:
    events, emit = event_recorder()
    with begin(tmp_path / "demo") as folder:
        folder.summary.write_text(content)
    before = folder.path.joinpath("recipe.yaml").read_bytes()
    with pytest.raises(UserError, match="no checkpoint to continue from: restore the file") as caught:
        begin(tmp_path / "demo", {**RECIPE, "rate": 0.3}, emit)
    assert problem in str(caught.value) and folder.path.joinpath("recipe.yaml").read_bytes() == before
    folder.checkpoint(1).mkdir(parents=True)
    with begin(tmp_path / "demo", emit=emit) as folder:
        assert folder.continued and folder.path.name == "demo"
    (event,) = events
    assert isinstance(event, LogMessage) and event.level == "warning"
    assert f"{folder.summary} is damaged (" in event.message and problem in event.message


@pytest.mark.parametrize("summary", [DONE_SUMMARY, DONE_CHAIN])
def test_a_summary_with_all_fields_is_that_of_a_finished_run(tmp_path: Path, summary: dict[str, Any]) -> None:
    with begin(tmp_path / "demo") as folder:
        folder.write_json("summary.json", summary)
    assert RunFolder.pick(tmp_path / "demo").name == "demo-2"


def test_folders_that_are_not_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="other exists and is not a run"):
        begin(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="thesis.txt: a part of this path is a file|thesis.txt.*file"):
        begin(tmp_path / "other" / "thesis.txt")
    with pytest.raises(UserError, match="a part of this path is a file"):
        begin(tmp_path / "other" / "thesis.txt" / "run")
    begin(tmp_path / "demo").close()
    (tmp_path / "demo" / "run.json").write_text("{")
    (tmp_path / "demo" / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run.json cannot be understood. Give another"):
        begin(tmp_path / "demo")
    (tmp_path / "empty").mkdir()
    begin(tmp_path / "empty").close()


@pytest.mark.parametrize(
    ("number", "words", "code"), [(errno.EACCES, "permission denied", 2), (errno.ENOSPC, "the disk is full", 1)]
)
def test_run_folder_that_cannot_be_created_states_path_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, code: int
) -> None:  # root may write everywhere, so the system's answer is put in its mouth
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match=f"cannot write .*demo: {words}") as caught:
        begin(tmp_path / "demo")
    assert caught.value.exit_code == code


def test_one_process_writes_a_run(tmp_path: Path) -> None:
    folder = begin(tmp_path / "demo")
    with pytest.raises(UserError, match=f"demo is being written by process {os.getpid()}$"):
        begin(tmp_path / "demo")
    program = (
        "import sys; from pathlib import Path; from lowrank_tune.checkpoint import RunFolder\n"
        "RunFolder.open(Path(sys.argv[1]), {}, '', lambda old, new: [], False, print)"
    )
    other = subprocess.run([sys.executable, "-c", program, str(tmp_path / "demo")], capture_output=True, text=True)
    assert other.returncode == 1 and f"is being written by process {os.getpid()}" in other.stderr
    folder.close()
    folder.close()
    begin(tmp_path / "demo").close()


def test_an_orphaned_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A run forks a worker and is killed; the worker still runs. The run can be continued."""
    (ready, notify), (wait, release) = os.pipe(), os.pipe()
    run = os.fork()
    if run == 0:
        try:
            begin(tmp_path / "demo")
            if os.fork() == 0:
                os.write(notify, b"x")
                os.read(wait, 1)
            else:
                os.read(ready, 1)
        finally:
            os._exit(7)
    os.waitpid(run, 0)
    try:
        with begin(tmp_path / "demo") as folder:
            assert folder.continued
    finally:
        os.write(release, b"x")


def test_run_folder_killed_while_opening_opens_again(tmp_path: Path) -> None:
    """Whatever is left of opening must be opened by the next start."""
    with pytest.MonkeyPatch.context() as patch:
        seen = count_calls(patch, -1, lambda: None)
        begin(tmp_path / "count").close()
        calls = len(seen)
    assert calls >= 9
    for at in range(calls):
        child = os.fork()
        if child == 0:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    count_calls(patch, at, lambda: os._exit(7))
                    begin(tmp_path / str(at))
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with begin(tmp_path / str(at)) as folder:
            assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "recipe.yaml", "run.json"]
