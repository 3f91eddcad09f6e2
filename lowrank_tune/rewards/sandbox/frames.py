"""Messages over a stream: four bytes with the length, then that many bytes. The confined side, which waits without a
time limit; the trusted side is `ipc.py`."""

from __future__ import annotations

import os
import struct

HEADER_BYTES = 4


def read_frame(descriptor: int) -> bytes:
    """Returns the next message. Raises EOFError at the end of the stream."""
    (length,) = struct.unpack("<I", _read_exactly(descriptor, HEADER_BYTES))
    return _read_exactly(descriptor, length)


def _read_exactly(descriptor: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(descriptor, min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def write_frame(descriptor: int, message: bytes) -> None:
    """Writes a whole message."""
    rest = memoryview(struct.pack("<I", min(len(message), 0xFFFFFFFF)) + message)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
