"""The confined side of a channel: every message begins with a nonce, the first message received, and its number."""

from __future__ import annotations

import struct

from lowrank_tune.rewards.sandbox import frames

NONCE_BYTES = 16


class AuthenticatedChannel:
    """Messages over one descriptor. The trusted side rejects a message without the nonce and the number: the code
    itself wrote it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._num_sent = 0
        self._nonce = frames.read_frame(descriptor)

    def receive(self) -> bytes:
        return frames.read_frame(self._descriptor)

    def send(self, message: bytes) -> None:
        self._num_sent += 1
        frames.write_frame(self._descriptor, self._nonce + struct.pack("<I", self._num_sent) + message)
