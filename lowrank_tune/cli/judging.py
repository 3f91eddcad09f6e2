"""Measure what a run made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowrank_tune.cli.common import Debug, app, sentences, starting
from lowrank_tune.errors import UserError


@app.command("eval")
def eval_command(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that trained a reward model.")],
                 file: Annotated[str, typer.Option("--file", help="Responses: rows with a prompt and an answer, or preference pairs.")],
                 out: Annotated[Path | None, typer.Option("--out", help="File for the scores; else RUN/scored-FILE.jsonl.")] = None,
                 debug: Debug = False) -> None:  # fmt: skip
    """Score a file of responses with the reward model of a run."""
    with sentences(debug):
        with starting():
            from lowrank_tune.evaluate import score_file
            from lowrank_tune.ui.plain import Plain
            from lowrank_tune.ui.scores_view import show

        plain = Plain(sys.stderr)
        try:
            found, pairs = score_file(run, file, plain)
        finally:
            plain.close()
        target = out or run / f"scored-{Path(file).name.removesuffix('.gz').rpartition('.')[0] or Path(file).name}.jsonl"
        lines = [json.dumps({"place": one.place, **({"side": one.side} if one.side else {}), "score": one.score, "tokens": one.tokens})
                 for one in found]  # fmt: skip
        try:
            target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
        show(found, pairs, Console(highlight=False))
        print(f"all scores: {target}")
