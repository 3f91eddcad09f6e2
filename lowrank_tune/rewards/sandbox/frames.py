"""Messages of known length over a stream: four bytes of length, then so many bytes. The confined side, which waits as
long as it lives."""

from __future__ import annotations

import os
import struct

HEAD = 4


def read(descriptor: int) -> bytes:
    """The next message. Raises EOFError at the end."""
    (length,) = struct.unpack("<I", _exactly(descriptor, HEAD))
    return _exactly(descriptor, length)


def _exactly(descriptor: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        if not (more := os.read(descriptor, min(count - len(parts), 1 << 20))):
            raise EOFError
        parts += more
    return bytes(parts)


def write(descriptor: int, message: bytes) -> None:
    """Writes a whole message."""
    rest = memoryview(struct.pack("<I", min(len(message), 0xFFFFFFFF)) + message)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
