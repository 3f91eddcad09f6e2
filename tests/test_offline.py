"""A file of the hub that is not here: each message names the variable that forbids the network, and how to get it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_tune.config import BaseConfig
from lowrank_tune.data.hub import describe_hub_error
from lowrank_tune.errors import UserError
from lowrank_tune.model.adapters import read_adapter
from lowrank_tune.model.base import load_config, load_tokenizer
from lowrank_tune.model.base_source import describe_load_errors
from lowrank_tune.offline import fetch_advice, offline_variable

NAME = "lowrank-tune-tests/none-such"


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_the_variable_that_forbids_the_network() -> None:
    assert offline_variable({"HF_HUB_OFFLINE": "1"}) == "HF_HUB_OFFLINE"
    assert offline_variable({"TRANSFORMERS_OFFLINE": "True"}) == "TRANSFORMERS_OFFLINE"
    assert offline_variable({"HF_HUB_OFFLINE": "0"}) == offline_variable({}) == ""


def test_advice_with_and_without_network() -> None:
    offline = fetch_advice("me/x", "v1", environ={"HF_HUB_OFFLINE": "1"})
    assert offline == (
        "HF_HUB_OFFLINE is set, so nothing is fetched: check the name, and unset HF_HUB_OFFLINE, or fetch it once with "
        "`env -u HF_HUB_OFFLINE hf download me/x --revision v1`"
    )
    online = fetch_advice("me/x", kind="dataset", environ={})
    assert "check the name and the network" in online and "--repo-type dataset --local-dir x" in online
    assert "OFFLINE" not in online


@pytest.mark.parametrize("is_offline", [True, False])
def test_every_place_has_the_reason_and_the_command(monkeypatch: pytest.MonkeyPatch, is_offline: bool) -> None:
    """The network is off in the tests either way: what differs is the variable."""
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if is_offline else "0")
    unreached = ConnectionError("Couldn't reach the Hub")
    messages = {
        "tokenizer": message_of(lambda: load_tokenizer(BaseConfig(model=NAME))),
        "base": message_of(lambda: load_config(BaseConfig(model=NAME))),
        "adapter": message_of(lambda: read_adapter(NAME, "adapters.sft.path")),
        "reward model": message_of(lambda: read_adapter(NAME, "adapters.reward.path", head=True)),
        "data set": describe_hub_error(unreached, NAME, None, "train", ""),
    }
    for place, message in messages.items():
        assert f"hf download {NAME}" in message, place
        assert ("HF_HUB_OFFLINE" in message) == is_offline, place
        if place in ("tokenizer", "base", "data set") and not is_offline:
            assert "check the name and the network" in message


def test_a_path_is_not_a_name_on_the_hub(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "./none", "runs/deep/none", "none"):
        assert "hf download" not in message_of(lambda path=path: read_adapter(path, "adapters.sft.path"))  # type: ignore[misc]


def test_a_full_disk_while_a_model_is_fetched_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def fetch() -> None:
        with describe_load_errors(BaseConfig(model="tiny-tutor")):
            raise OSError(errno.ENOSPC, "No space left on device")

    message = message_of(fetch)
    assert "the disk is full" in message and f"free on the disk of {tmp_path}" in message and "HF_HOME" in message
    words = describe_hub_error(OSError(errno.ENOSPC, "No space left on device"), NAME, None, "train", "")
    assert "the disk is full" in words and "HF_HOME" in words
