"""A file of a folder that was written in one piece and has changed since is found, and an adapter that has changed is
not loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from run_summaries import DONE_SUMMARY

from lowrank_tune.checkpoint import Snapshot, broken_final_reason, load, quarantine_broken_final, write_atomically
from lowrank_tune.config import Chain, load_any
from lowrank_tune.errors import UserError
from lowrank_tune.events import Event, LogMessage
from lowrank_tune.manifest import changed_file, manifest_files
from lowrank_tune.model.adapters import ROPE, STACK, adapter_rope_factors, read_adapter
from lowrank_tune.runner import finished_stages

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def final_of(folder: Path, names: tuple[str, ...] = ("",)) -> Path:
    """A final folder with adapters at its root and in folders of their names."""
    snapshot = Snapshot(raw_files={"README.md": b"a card"})
    for name in names:
        prefix = f"{name}/" if name else ""
        weights = {"base_model.model.q.lora_A.weight": torch.ones(2, 3)}
        snapshot.tensors[f"{prefix}{ADAPTER}"] = weights
        snapshot.documents[f"{prefix}{CONFIG}"] = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}
    return write_atomically(folder / "final", snapshot)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_changed_and_missing_files(tmp_path: Path) -> None:
    final = final_of(tmp_path)
    assert set(manifest_files(final)) == {"README.md", ADAPTER, CONFIG}
    assert changed_file(final, [ADAPTER, CONFIG, "README.md", "not-listed"]) is None
    flip(final / ADAPTER)
    assert changed_file(final, [CONFIG, ADAPTER]) == ADAPTER and changed_file(final, [CONFIG]) is None
    (final / CONFIG).unlink()
    assert changed_file(final, [CONFIG]) == CONFIG


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 100_000, '{"files": {"README.md": 3}}'])
def test_a_broken_or_foreign_manifest_lists_nothing(tmp_path: Path, text: str) -> None:
    final = final_of(tmp_path)
    (final / "manifest.json").write_text(text)
    assert manifest_files(final) == {}
    read_adapter(str(tmp_path), "key")


def test_a_manifest_or_a_listed_file_that_is_not_regular_is_refused_at_once(tmp_path: Path) -> None:
    """The folder may come from anyone."""
    final = final_of(tmp_path)
    manifest = (final / "manifest.json").rename(tmp_path / "manifest.json")
    (final / "manifest.json").touch()
    os.truncate(final / "manifest.json", 1 << 40)
    assert manifest_files(final) == {}
    (final / "manifest.json").unlink()
    os.mkfifo(final / "manifest.json")
    assert manifest_files(final) == {}
    manifest.replace(final / "manifest.json")
    (final / "README.md").unlink()
    os.mkfifo(final / "README.md")
    assert changed_file(final, ["README.md"]) == "README.md"


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    path = final_of(tmp_path) / "manifest.json"
    raw = path.read_bytes()
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert manifest_files(path.parent) == {}


@pytest.mark.parametrize("name", [ADAPTER, CONFIG])
@pytest.mark.parametrize("folder", ["", "policy"])
def test_a_changed_adapter_is_not_loaded(tmp_path: Path, name: str, folder: str) -> None:
    """At the root of `final/`, and in a folder below it, whose manifest is that of `final/`."""
    final = final_of(tmp_path, ("", "policy"))
    read_adapter(str(final / folder), "adapters.sft.path")
    if name == CONFIG:
        (final / folder / name).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 99}))
    else:
        flip(final / folder / name)
    with pytest.raises(UserError, match=f"adapters.sft.path: .*{name} has changed since it was written.*manifest.json"):
        read_adapter(str(final / folder), "adapters.sft.path")
    (final / "manifest.json").unlink()
    read_adapter(str(final / folder), "adapters.sft.path")


def stacked_final(folder: Path) -> Path:
    """A final folder with its trained adapter at the root, over a frozen one, and both files with the loading
    instructions."""
    final = final_of(folder, ("", "below"))
    whole = load(final)
    whole.documents[STACK] = {
        "stack": ["below", "policy"],
        "frozen_adapters": {"below": "hash"},
        "combined": False,
    }
    whole.documents[ROPE] = {"version": 1, "factors": "long"}
    return write_atomically(final, whole)


@pytest.mark.parametrize("damage", ["delete", "change"])
@pytest.mark.parametrize("name", [STACK, ROPE])
def test_stack_and_factors_are_as_they_were_written(tmp_path: Path, name: str, damage: str) -> None:
    """Without its stack the adapter would be loaded over the bare base; without its factors, with the short ones."""
    final = stacked_final(tmp_path)

    def loaded() -> tuple[list[str], str | None]:
        return list(read_adapter(str(tmp_path), "key").frozen_adapters), adapter_rope_factors(str(tmp_path))

    assert loaded() == (["below"], "long") and broken_final_reason(final) is None
    if damage == "delete":
        (final / name).unlink()
    else:
        (final / name).write_text((final / name).read_text().replace("long", "short").replace("hash", "other"))
    words = "is missing" if damage == "delete" else "has changed since it was written"
    with pytest.raises(UserError, match=f"{name} {words}: restore it from a copy, or delete .*manifest.json"):
        loaded()
    assert name in str(broken_final_reason(final))
    (final / "manifest.json").unlink()
    loaded()


@pytest.mark.parametrize("name", [CONFIG, STACK, ROPE])
def test_files_nested_without_end_are_broken(tmp_path: Path, name: str) -> None:
    final = stacked_final(tmp_path)
    (final / "manifest.json").unlink()
    (final / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match="broken: .*nested deeper than 100 levels"):
        read_adapter(str(tmp_path), "key")
        adapter_rope_factors(str(tmp_path))


def test_files_that_users_may_edit_are_not_checked(tmp_path: Path) -> None:
    (final_of(tmp_path) / "README.md").write_text("a better card")
    events: list[Event] = []
    assert not quarantine_broken_final(tmp_path / "final", events.append) and events == []
    read_adapter(str(tmp_path), "key")


@pytest.mark.parametrize("name", [None, "manifest.json", ADAPTER, CONFIG])
def test_an_incomplete_final_folder_is_not_whole(tmp_path: Path, name: str | None) -> None:
    """Emptied; with a torn manifest; and without a manifest and one of the files that an adapter must have."""
    final = final_of(tmp_path)
    torn = final / "manifest.json"
    if name is None:
        for file in final.iterdir():
            file.unlink()
    elif name == torn.name:
        torn.write_bytes(torn.read_bytes()[:-5])
    else:
        torn.unlink()
        assert broken_final_reason(final) is None
        (final / name).unlink()
    assert (name or CONFIG) in str(broken_final_reason(final))


@pytest.mark.parametrize("damage", ["flip", "delete", "delete all"])
def test_a_broken_final_steps_out_of_the_way(tmp_path: Path, damage: str) -> None:
    final, events = final_of(tmp_path, ("", "policy")), list[Event]()
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    if damage == "flip":
        flip(final / "policy" / ADAPTER)
    elif damage == "delete":
        (final / CONFIG).unlink()
    else:
        final.rename(tmp_path / "elsewhere")
    assert quarantine_broken_final(final, events.append) and not final.exists()
    assert (tmp_path / "broken-final").is_dir() == (damage != "delete all")
    (message,) = events
    assert isinstance(message, LogMessage) and message.level == "warning" and "written again" in message.message


@pytest.mark.parametrize("is_missing", [False, True])
def test_broken_final_without_checkpoint_is_unchanged(tmp_path: Path, is_missing: bool) -> None:
    """Only the user decides whether the stage is trained again."""
    final, events = final_of(tmp_path / "1-sft"), list[Event]()
    (tmp_path / "1-sft" / "checkpoints").mkdir()
    if is_missing:
        final.rename(tmp_path / "elsewhere")
    else:
        flip(final / ADAPTER)
    before = sorted(tmp_path.rglob("*"))
    choice = (
        r"contains no checkpoint to write it from: restore .*final from a copy, or delete .*1-sft to train this stage"
    )
    with pytest.raises(UserError, match=choice):
        quarantine_broken_final(final, events.append)
    assert sorted(tmp_path.rglob("*")) == before and events == []


def test_a_stage_with_a_broken_final_folder_has_not_finished(tmp_path: Path) -> None:
    """Preflight then expects its adapter from the stage itself, which writes its final folder again."""
    chain = load_any("tiny-rlhf")
    assert isinstance(chain, Chain)
    first, second = (tmp_path / f"{number}-{stage.name}" for number, stage in enumerate(chain.stages[:2], 1))
    for stage in (first, second):
        final_of(stage)
        (stage / "summary.json").write_text(json.dumps(DONE_SUMMARY))
    names = [stage.name for stage in chain.stages]
    assert finished_stages(chain, tmp_path) == set(names[:2])
    flip(first / "final" / ADAPTER)
    assert finished_stages(chain, tmp_path) == {names[1]}
    (second / "summary.json").write_text('{"status": "interrupted"}')
    assert finished_stages(chain, tmp_path) == frozenset()
