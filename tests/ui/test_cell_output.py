"""A command behind `!` in a cell of a notebook has a terminal without cursor movement: it writes plain lines."""

from __future__ import annotations

import io

import pytest

from lowrank_tune.cli import common
from lowrank_tune.events import Progress, warning
from lowrank_tune.ui.cell_output import in_cell
from lowrank_tune.ui.terminal.plain import LineLogger


class Terminal(io.StringIO):
    """A file that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_cell_is_known_by_its_environment() -> None:
    assert in_cell({"JPY_PARENT_PID": "7"}) and in_cell({"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert not in_cell({}) and not in_cell({"MPLBACKEND": "agg", "TERM": "xterm-color"})


@pytest.mark.parametrize(("variables", "is_plain"), [({}, False), ({"JPY_PARENT_PID": "7"}, True)])
def test_bars_and_colors_are_not_written_to_a_cell(variables: dict[str, str], is_plain: bool) -> None:
    file = Terminal()
    logger = LineLogger(file, {"TERM": "xterm-color", **variables})
    for done in range(4):
        logger(Progress(description="reading", done=done, total=3))
    logger(warning("careful"))
    logger.close()
    assert ("\x1b" not in file.getvalue()) == is_plain
    assert "careful" in file.getvalue()


def test_no_spinner_turns_in_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal()
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.setenv("TERM", "xterm-color")
    for variables, shown in (({}, True), ({"JPY_PARENT_PID": "7"}, False)):
        monkeypatch.delenv("JPY_PARENT_PID", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with common.status_message("starting") as status:
            assert (status is not None) == shown
