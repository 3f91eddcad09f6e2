"""The confined side of a conversation: every message carries the nonce that came first, and its number."""

from __future__ import annotations

import struct

from lowrank_tune.rewards.sandbox import frames

NONCE = 16


class Talk:
    """Messages over one descriptor. What does not begin as it must was written by someone else."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._sent = descriptor, 0
        self._nonce = frames.read(descriptor)

    def hear(self) -> bytes:
        return frames.read(self._descriptor)

    def tell(self, message: bytes) -> None:
        self._sent += 1
        frames.write(self._descriptor, self._nonce + struct.pack("<I", self._sent) + message)
