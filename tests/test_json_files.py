"""JSON from elsewhere has a limit of depth, whichever file it is in, and no reader of the package is without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lowrank_tune
from lowrank_tune.assembly.reward_model import _reward_model_lineage
from lowrank_tune.chat.conversation import append_row
from lowrank_tune.checkpoint import checkpoint
from lowrank_tune.checkpoint.folder import RunFolder
from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.data.files import open_file, parse_line
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.token_store import TokenizedDataset
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.results import read_records
from lowrank_tune.export.gguf.model import pretokenizer_name
from lowrank_tune.json_files import MAX_DEPTH, parse_json, read_json, read_json_object
from lowrank_tune.manifest import MANIFEST, manifest_files
from lowrank_tune.rewards.code.python_tests_worker import _text_list
from lowrank_tune.run_summary import read_done_summary
from lowrank_tune.training.trackers import _read_state
from lowrank_tune.ui.run_paths import parse_event, stage_folders

PACKAGE = Path(lowrank_tune.__file__).parent
DEEP = b'{"a":' * 100_000
DEEP_LIST = b"[" * 300 + b"]" * 300


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_depth_has_a_limit() -> None:
    assert MAX_DEPTH == 100
    parse_json(nested(100))
    parse_json("[" + ", ".join([nested(99)] * 50) + "]")
    for text in (nested(101), nested(100_000), '{"a": ' + nested(100) + "}", nested(101).encode()):
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            parse_json(text)


def test_brackets_in_strings_and_beside_each_other_are_no_depth() -> None:
    assert parse_json('["' + "[{" * 500 + '"]') == ["[{" * 500]
    assert parse_json("[" + ",".join(["{}"] * 500) + "]") == [{}] * 500


READERS: dict[str, tuple[str, Callable[[Path], Any], Any]] = {
    "summary": ("summary.json", read_done_summary, None),
    "trackers": ("trackers.json", _read_state, {}),
    "manifest": (MANIFEST, manifest_files, {}),
    "token store": ("store.json", TokenizedDataset.open, None),
    "run format": ("run.json", check_run_format, None),
    "stages": ("run.json", lambda folder: stage_folders(folder) == [folder], True),
    "tokenizer": ("tokenizer.json", pretokenizer_name, None),
    "evaluations": ("evals.jsonl", read_records, []),
    "reward model": ("base.json", lambda folder: _reward_model_lineage(folder / "final"), {}),
    "lenient": ("data.json", lambda folder: read_json_object(folder / "data.json"), {}),
    "event": ("events.jsonl", lambda folder: parse_event((folder / "events.jsonl").read_bytes()), None),
}


@pytest.mark.filterwarnings("ignore:.*evals.jsonl is damaged:RuntimeWarning")
@pytest.mark.parametrize("data", [DEEP, DEEP_LIST], ids=["unclosed", "closed"])
@pytest.mark.parametrize("case", READERS)
def test_deeply_nested_file_counts_as_damaged(case: str, data: bytes, tmp_path: Path) -> None:
    name, read, expected = READERS[case]
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path) == expected


@pytest.mark.parametrize("data", [DEEP, DEEP_LIST], ids=["unclosed", "closed"])
def test_deeply_nested_file_is_refused_in_one_sentence(data: bytes, tmp_path: Path) -> None:
    for name in (MANIFEST, "rows.json", "talk.jsonl"):
        (tmp_path / name).write_bytes(data + b"\n")
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.load(tmp_path)
    (tmp_path / "rows.json").write_bytes(b"[" + data + b"]")
    with pytest.raises(UserError, match="rows.json: the JSON array cannot be read .nested deeper than 100 levels"):
        open_file(tmp_path / "rows.json", "rows.json")
    with pytest.raises(UserError, match="is not a JSON lines file"):
        append_row(tmp_path / "talk.jsonl", [])
    assert isinstance(parse_line(data), InvalidRow)
    assert _text_list(data.decode()) == [data.decode()]


def test_deeply_nested_recipe_of_a_run_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(DEEP)
    with pytest.raises(ValueError, match="nested deeper"):
        RunFolder(tmp_path).stored_recipe()


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reader_refuses_what_is_no_regular_file_or_too_large(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text("[1, 2, 3]")
    with pytest.raises(OSError, match="it has 9 bytes, and the limit is 8"):
        read_json(tmp_path / "large.json", max_bytes=8)
    with pytest.raises(OSError, match="it is a device"):
        read_json(Path("/dev/zero"))
    num_open = num_descriptors()
    with pytest.raises(OSError, match="it is a folder, not a regular file"):
        read_json(tmp_path)
    assert num_descriptors() == num_open, "the folder is closed again"


OWN_JSON = {
    "json_files.py": "the reader with the limit",
    "model/configs/__init__.py": "files of the package",
    "export/model_files.py": "a file that the tokenizer has just written",
    "data/templates/backend.py": "text that the tokenizers library writes, whose own limit of depth is 128",
    "data/head.py": "raw_decode; RecursionError is handled there",
    "rewards/text/json_schema_worker.py": "a completion, with a limit of its own",
    "rewards/text/json_schema.py": "what the line before has written",
    "processes/child.py": "requests of the main process",
    "processes/worker_process.py": "replies of a worker; RecursionError is handled there",
}


def test_every_other_module_reads_json_with_the_limit() -> None:
    readers = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if re.search(r"\bjson\.loads?\(|JSONDecoder|from json import", file.read_text(encoding="utf-8"))
    }
    assert readers == set(OWN_JSON)
