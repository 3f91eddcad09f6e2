"""The start of a confined process, called by `launch` with the arguments of `main`. Imports all modules of the package
that the process needs, before it is confined."""

from __future__ import annotations

import os

from lowrank_tune.rewards.sandbox import frames, solver, tester
from lowrank_tune.rewards.sandbox.confine import confine
from lowrank_tune.rewards.sandbox.handshake import AuthenticatedChannel
from lowrank_tune.rewards.sandbox.values import encode

ROLES = {"solver": solver.serve, "tester": tester.serve}


def main(
    role: str,
    level: str,
    *numbers: str,
) -> None:
    """Confines this process and serves a role until the channel is closed. `numbers`: the descriptor of the channel,
    the process id of the parent, and the limits of `confine`."""
    descriptor, *rest = map(int, numbers)
    try:
        status = confine(level, descriptor, *rest)
    except OSError as error:
        frames.write_frame(descriptor, encode({"fault": str(error)}))
        os._exit(1)
    frames.write_frame(descriptor, encode(status))
    try:
        ROLES[role](AuthenticatedChannel(descriptor))
    except EOFError:  # the channel was closed
        os._exit(0)
