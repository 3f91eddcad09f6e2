"""A conversation with what a run trained: `lowrank-tune chat RUN|MODEL`. Adapters on, off, or both, over one base in
memory."""

from __future__ import annotations

import sys

from lowrank_tune.chat.commands import HELP
from lowrank_tune.chat.opening import open_speaker
from lowrank_tune.chat.session import Session
from lowrank_tune.chat.speaker import Answering, Speaker, Voice
from lowrank_tune.chat.talk import Talk, append_row
from lowrank_tune.chat.wishes import Wishes
from lowrank_tune.ui.plain import Plain
from lowrank_tune.ui.talk import Screen

__all__ = ["Answering", "Session", "Speaker", "Talk", "Voice", "Wishes", "append_row", "chat", "open_speaker"]


def chat(
    name: str,
    wishes: Wishes,
    voice: str | None = None,
    system: str | None = None,
    bits: int | None = None,
    base: str | None = None,
) -> None:
    """Opens a RUN or MODEL and talks to whoever types, until the end of the input. `system` None is the run's own, an
    empty one is none.

    Raises UserError, and KeyboardInterrupt where it was interrupted and nobody types.
    """
    plain = Plain(sys.stderr)
    try:
        speaker = open_speaker(name, plain, bits, base)
    finally:
        plain.close()
    screen = Screen(list(HELP))
    session = Session(
        speaker, screen, wishes, voice or speaker.voices[-1], speaker.system if system is None else system
    )
    if screen.live:
        screen.note(_greeting(session))
    session.run()


def _greeting(session: Session) -> str:
    heard = " and ".join(session.voices)
    drawn = (
        "greedy, as in evaluation" if session.wishes.temperature == 0 else f"temperature {session.wishes.temperature:g}"
    )
    system = ", with a system prompt (/system shows it)" if session.talk.system else ""
    other = "/base, /tuned and /both choose who answers, " if session.speaker.tuned else ""
    return f"{heard} will answer, {drawn}{system}\n{other}/help lists all commands, Ctrl-D ends"
