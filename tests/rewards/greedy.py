"""A verifier that exceeds the limits around its calls, in the way that `completion` names."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any


def load(job: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    kept: list[bytearray] = []

    def grade(request: Mapping[str, Any]) -> Any:
        word = request["completion"]
        if word == "memory":
            return len(bytearray(3 << 30))
        if word == "hidden":  # like a library that tries something else if memory runs out
            with suppress(MemoryError):
                bytearray(3 << 30)
            return len(bytearray(b"\x01") * (300 << 20)) > 0
        if word == "keeps":
            kept.append(bytearray(b"\x01") * (300 << 20))
        while word == "spins":
            try:  # noqa: SIM105 - a signal can also come while `suppress` itself runs, which then suppresses nothing
                pass
            except Exception:
                pass
        if word == "deaf":
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
        while word == "deaf":
            pass
        return 1.0

    return grade
