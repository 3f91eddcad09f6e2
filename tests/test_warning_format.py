"""Warnings on the command line are sentences; those of libraries keep their place in the code."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

from lowrank_tune.cli import plan
from lowrank_tune.cli.warning_format import format_warning


def test_a_warning_of_the_kit_is_a_sentence_and_that_of_a_library_has_its_place() -> None:
    assert (
        format_warning("plans cannot be cached", RuntimeWarning, plan.__file__, 7)
        == "warning: plans cannot be cached\n"
    )
    other = format_warning("deprecated", UserWarning, warnings.__file__, 7)
    assert other.startswith(f"{warnings.__file__}:7: UserWarning: deprecated\n")


def test_the_command_line_prints_a_warning_of_the_kit_in_one_line(tmp_path: Path) -> None:
    program = """if True:
        import warnings
        from lowrank_tune import cli
        def app():
            warnings.warn_explicit("report.html could not be written", RuntimeWarning, cli.__file__, 1)
        cli.app = app
        cli.main()"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "warning: report.html could not be written\n"
