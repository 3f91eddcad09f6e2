"""`evals.jsonl`: damaged lines are named in a warning, and the other evaluations are read."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from lowrank_tune.evaluation.results import EVALS, VERSION, append_record, read_records


def record(origin: str) -> dict[str, object]:
    return {"v": VERSION, "kind": "eval", "dataset": {"origin": origin}}


def origins(folder: Path) -> list[str]:
    return [each.origin for each in read_records(folder)]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"{\n", "1 line (line 2) cannot be read"),
        (b'{"v": 2, "kind": "ev', "1 line (line 2) cannot be read"),
        (b"\xff\xfe\n[1]\n", "2 lines (the first is line 2) cannot be read"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes, words: str) -> None:
    """The second one is the incomplete line of a crash, before another evaluation."""
    append_record(tmp_path / EVALS, record("first"))
    with (tmp_path / EVALS).open("ab") as file:
        file.write(damage)
    append_record(tmp_path / EVALS, record("last"))
    with pytest.warns(RuntimeWarning) as caught:
        assert origins(tmp_path) == ["first", "last"]
    (warning,) = caught
    assert f"{tmp_path / EVALS} is damaged: {words}; " in str(warning.message)


def test_empty_lines_and_other_versions_are_no_damage(tmp_path: Path) -> None:
    append_record(tmp_path / EVALS, record("first"))
    with (tmp_path / EVALS).open("ab") as file:
        file.write(b'\n  \n{"v": 9, "kind": "eval"}\n{"v": 2, "kind": "other"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert origins(tmp_path) == ["first"] and read_records(tmp_path / "none") == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / EVALS).mkdir()
    with pytest.warns(RuntimeWarning, match="evals.jsonl cannot be read .*directory.*, so no evaluation is shown"):
        assert read_records(tmp_path) == []
