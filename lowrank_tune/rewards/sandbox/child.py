"""Where a confined process begins: `launch` starts it with the arguments of `main`. All that it needs of the kit is
imported before."""

from __future__ import annotations

import os

from lowrank_tune.rewards.sandbox import frames, solver, tester
from lowrank_tune.rewards.sandbox.confine import confine
from lowrank_tune.rewards.sandbox.handshake import AuthenticatedChannel
from lowrank_tune.rewards.sandbox.values import encode

ROLES = {"solver": solver.serve, "tester": tester.serve}


def main(role: str, level: str, *numbers: str) -> None:
    """`numbers`: the descriptor of the conversation, the parent's process, and the limits of `confine`."""
    descriptor, *rest = map(int, numbers)
    try:
        status = confine(level, descriptor, *rest)
    except OSError as error:
        frames.write_frame(descriptor, encode({"fault": str(error)}))
        os._exit(1)
    frames.write_frame(descriptor, encode(status))
    try:
        ROLES[role](AuthenticatedChannel(descriptor))
    except EOFError:  # nobody asks any more
        os._exit(0)
