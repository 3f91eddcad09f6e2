"""A file that is damaged on disk is found when a killed run is continued: an older checkpoint is used, what can be
written again is, and otherwise an error names the file. No result differs without a message.

`LOWRANK_TUNE_TEST_ROUNDS=25` draws so many times as often, `LOWRANK_TUNE_TEST_SEED` from another seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corruption import LOST_BEST, OUTCOMES, SITUATIONS, Corruptions, flip, results, swap
from crash import KILL_POINTS, rounds, seed
from faults import CommandServer, checkpoints_of, fault_recipe

pytestmark = pytest.mark.slow
DRAWS = 3


@pytest.fixture(scope="module")
def server() -> Iterator[CommandServer]:
    one = CommandServer()
    yield one
    one.close()


@pytest.fixture(scope="module", params=["sft", "in the second stage"])
def corruptions(
    server: CommandServer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Corruptions:
    return Corruptions(server, tmp_path_factory.mktemp("corruption"), seed(), [request.param])


@pytest.mark.parametrize("number", range(DRAWS * rounds()))
def test_a_run_with_random_damage_is_refused_or_ends_equal(corruptions: Corruptions, number: int) -> None:
    line = corruptions.draw()
    print(line)
    assert line.rpartition(": ")[2] in OUTCOMES


def test_an_adapter_that_changed_between_two_stages(server: CommandServer, tmp_path: Path) -> None:
    """The stage that ended writes its final folder again, and the next one trains over what it should."""
    name, files = "between stages", ("adapter_model.safetensors", "adapter_config.json")
    corruptions = Corruptions(server, tmp_path, seed(), [name])
    _, wanted = corruptions.straight(name)
    for number, file in enumerate(files):
        out = corruptions.restore(name)
        flip(out / "1-sft" / "final" / file, corruptions.stream)
        outcome = server.run(SITUATIONS[name].recipe(), out)
        assert outcome.code == 0 and results(out) == wanted, f"{number}: {outcome.text}"
        assert file in outcome.text and (out / "1-sft" / "broken-final").is_dir()


def test_the_best_checkpoint_changed_places(server: CommandServer, tmp_path: Path) -> None:
    """Whole and valid, but of another step: it is not taken for the best one."""
    recipe: dict[str, Any] = fault_recipe("sft")
    # The second step is the best one.
    recipe["train"] |= {"learning_rate": 1.0, "lr_scheduler_type": "constant"}
    recipe["evaluate"] |= {"eval_steps": 2}
    out = tmp_path / "run"
    assert server.run(recipe, out, die_in=(*KILL_POINTS["end of a stage"], 0)).code == -9
    found = checkpoints_of(out)
    assert sorted(found) == [2, 4, 6]
    swap(found[2], found[4])
    outcome = server.run(recipe, out)
    assert outcome.code == 0 and LOST_BEST in outcome.text and "it was written as step-4" in outcome.text
