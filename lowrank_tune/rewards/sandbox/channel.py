"""The trusted side of a stream of messages: every wait has a deadline, and what comes has a longest length."""

from __future__ import annotations

import select
import socket
import struct
import time

from lowrank_tune.rewards.sandbox.frames import HEAD

LONGEST = 4 << 20  # bytes of one message that are taken


class Late(Exception):
    """Nothing came in time."""


class Closed(Exception):
    """The other side is gone."""


class TooLong(Exception):
    """The other side began a message of more than LONGEST bytes."""


class Channel:
    """One stream. Deadlines are of time.monotonic."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream, self._came = stream, bytearray()
        stream.setblocking(False)

    def send(self, message: bytes, deadline: float) -> None:
        """Raises Late or Closed."""
        rest = memoryview(struct.pack("<I", len(message)) + message)
        while rest:
            try:
                rest = rest[self._stream.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError:
                raise Closed from None

    def receive(self, deadline: float) -> bytes:
        """The next message. Raises Late, Closed or TooLong."""
        while (message := self._whole()) is None:
            if time.monotonic() > deadline:  # also where a little always comes
                raise Late
            try:
                more = self._stream.recv(1 << 18)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError:
                raise Closed from None
            if not more:
                raise Closed
            self._came += more
        return message

    def _whole(self) -> bytes | None:
        if len(self._came) < HEAD:
            return None
        (length,) = struct.unpack_from("<I", self._came)
        if length > LONGEST:
            raise TooLong
        if len(self._came) < HEAD + length:
            return None
        message = bytes(self._came[HEAD : HEAD + length])
        del self._came[: HEAD + length]
        return message

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._stream, event)
        if not poll.poll(max(0.0, 1e3 * (deadline - time.monotonic()))):
            raise Late

    def closed(self) -> bool:
        """Whether the other side has ended the stream."""
        try:
            return self._stream.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._stream.close()
