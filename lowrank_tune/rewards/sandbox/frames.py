"""Messages of known length over a stream: four bytes of length, then so many bytes. The confined side, which waits as
long as it lives."""

from __future__ import annotations

import os
import struct

HEADER_BYTES = 4


def read_frame(descriptor: int) -> bytes:
    """The next message. Raises EOFError at the end."""
    (length,) = struct.unpack("<I", _read_exactly(descriptor, HEADER_BYTES))
    return _read_exactly(descriptor, length)


def _read_exactly(descriptor: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        if not (more := os.read(descriptor, min(count - len(parts), 1 << 20))):
            raise EOFError
        parts += more
    return bytes(parts)


def write_frame(descriptor: int, message: bytes) -> None:
    """Writes a whole message."""
    rest = memoryview(struct.pack("<I", min(len(message), 0xFFFFFFFF)) + message)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
