"""Data sets and files of rewards that are FIFOs, devices, or absurdly large, and rules of a tokenizer that take too
long: refused at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lowrank_tune.config import BaseConfig, SourceConfig
from lowrank_tune.data.sources import open_local_files
from lowrank_tune.data.templates.backend import TokenizerBackend
from lowrank_tune.errors import UserError
from lowrank_tune.model.base import load_tokenizer
from lowrank_tune.rewards.text.json_schema import read_schema
from lowrank_tune.rewards.user_function import read_user_function


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


def special_file(folder: Path, kind: str, suffix: str) -> Path:
    path = folder / f"special{suffix}"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    return path


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_data_set_is_a_regular_file(kind: str, tmp_path: Path) -> None:
    path = special_file(tmp_path, kind, ".jsonl")
    with pytest.raises(UserError, match=f"special.jsonl: cannot be read .it is a {kind}, not a regular file"):
        open_local_files(SourceConfig(dataset=str(path)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("FIFO", "it is a FIFO"), ("device", "it is a device"), ("large", "the limit is 1,048,576")],
)
def test_files_of_rewards_are_regular_and_small(kind: str, message: str, tmp_path: Path) -> None:
    program = special_file(tmp_path, kind, ".py")
    with pytest.raises(UserError, match=f"cannot be read: .*{message}"):
        read_user_function("own", f"{program}:reward", tmp_path)
    schema = special_file(tmp_path, kind, ".json")
    with pytest.raises(UserError, match=f"cannot be read: .*{message}"):
        read_schema("json_schema", str(schema), tmp_path)


def test_deeply_nested_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_bytes(b'{"not":' * 200 + b"{}" + b"}" * 200)
    with pytest.raises(UserError, match="schema.json is not JSON: nested deeper than 100 levels"):
        read_schema("json_schema", "schema.json", tmp_path)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y"])
def test_rule_of_a_tokenizer_that_takes_too_long_ends_in_one_sentence(
    pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tokenizers library gives up after a number of retries, with an error that is derived from BaseException."""
    state = json.loads(toy_tokenizer().backend_tokenizer.to_str())
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state | {"pre_tokenizer": rule})))
    backend = TokenizerBackend(broken)
    text = pattern[1] * 40 + "!"
    for encode in (backend.encode_plain, backend.encode_with_special_tokens):
        with pytest.raises(UserError, match="^base.model: its tokenizer fails on a text .*retry-limit"):
            encode([text])
    with pytest.raises(UserError, match="^base.model: its tokenizer fails on a text"):
        backend.encode_continuation(text)
    capfd.readouterr()


def toy_tokenizer() -> Any:
    return load_tokenizer(BaseConfig())
