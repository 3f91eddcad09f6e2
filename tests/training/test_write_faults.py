"""A write that fails anywhere in a run ends it with a sentence, or is completed; what was saved stays valid, nothing
else stays, and the same command continues to the same result.

`LOWRANK_TUNE_TEST_ROUNDS=25` draws so many times as often, `LOWRANK_TUNE_TEST_SEED` from another seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash import rounds, seed
from failing_disk import Fault
from faults import CommandServer, WriteFaults, check_failed_run, fault_recipe

pytestmark = pytest.mark.slow
DRAWS = 4


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WriteFaults]:
    server = CommandServer()
    yield WriteFaults(server, tmp_path_factory.mktemp("faults"), seed())
    server.close()


@pytest.mark.parametrize("number", range(DRAWS * rounds()))
def test_a_fault_at_a_random_write(faults: WriteFaults, number: int) -> None:
    line = faults.draw()
    print(line)
    assert line.endswith(", equal")


def test_the_harness_hits_what_it_counts(faults: WriteFaults, tmp_path: Path) -> None:
    """Every kind of call is counted; the drawn one fails; and what must hold can fail."""
    _, calls = faults.straight("sft")
    assert calls.keys() == {"write", "open", "fsync", "rename", "mkdir"}
    out, fault = tmp_path / "run", Fault("ENOSPC", sum(calls.values()) // 2)
    outcome = faults.server.run(fault_recipe("sft"), out, fault)
    assert outcome.code == 1 and outcome.hit and os.strerror(5) not in outcome.text
    check_failed_run(out, outcome, fault)
    with pytest.raises(AssertionError):
        check_failed_run(out, outcome, Fault("EIO", fault.at))
    (out / ".tmp-junk").touch()
    with pytest.raises(AssertionError):
        check_failed_run(out, outcome, fault)
