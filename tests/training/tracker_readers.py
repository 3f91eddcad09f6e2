"""What the libraries of the trackers have stored, read with their own readers: values by metric and step."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Stored = dict[tuple[str, int], list[float]]
BLOCK_BYTES = 32768
FILE_HEADER_BYTES = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
"""A record of wandb's file, or a part of one that crosses a block."""


def read_stored(tracker: str, folder: Path) -> tuple[Stored, dict[str, Any]]:
    """Returns all values of the run in a folder, and its settings."""
    readers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
    return readers[tracker](folder)


def _tensorboard(folder: Path) -> tuple[Stored, dict[str, Any]]:
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    found: Stored = defaultdict(list)
    for tag in reader.Tags()["scalars"]:
        for point in reader.Scalars(tag):
            found[tag, point.step].append(point.value)
    (file,) = (folder / "tensorboard").rglob("hparams.yml")
    return found, yaml.safe_load(file.read_text())


def _wandb(folder: Path) -> tuple[Stored, dict[str, Any]]:
    """Reads the files of all sessions, as `wandb sync` does; wandb has no reader for them in Python but its messages.

    The value of a later session is the last one.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found: Stored = defaultdict(list)
    settings = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in _wandb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for name, value in values.items():
                    if not name.startswith("_"):
                        found[name, values["_step"]].append(value)
            for update in record.config.update if kind == "config" else record.run.config.update:
                settings[update.key] = json.loads(update.value_json)
    return found, settings


def _wandb_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a file in the format of LevelDB's log."""
    place = FILE_HEADER_BYTES
    parts = b""
    while place + 7 <= len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST) and len(part) == length:
            yield parts


def _mlflow(folder: Path) -> tuple[Stored, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(_run_of(folder, "mlflow"))
    assert run.info.status == "FINISHED"
    found: Stored = defaultdict(list)
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found[name, point.step].append(point.value)
    return found, run.data.params


def _trackio(folder: Path) -> tuple[Stored, dict[str, Any]]:
    """Reads in a process of its own: trackio takes its folder from the environment when it is imported."""
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as storage; run = sys.argv[1]; "
        "print(json.dumps([storage.get_logs('checked', run), storage.get_run_config('checked', run)], default=str))"
    )
    command = [sys.executable, "-c", code, _run_of(folder, "trackio")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    logs, settings = json.loads(done.stdout.splitlines()[-1])
    found: Stored = defaultdict(list)
    for row in logs:
        for metric, value in row.items():
            if metric not in ("step", "timestamp"):
                found[metric, row["step"]].append(value)
    return found, settings or {}


def _run_of(folder: Path, tracker: str) -> str:
    return str(json.loads((folder / "trackers.json").read_text())["runs"][tracker])
