"""The trusted side of a stream of messages: every wait has a deadline, and what comes has a longest length."""

from __future__ import annotations

import select
import socket
import struct
import time

from lowrank_tune.rewards.sandbox.frames import HEADER_BYTES

MAX_MESSAGE_BYTES = 4 << 20  # bytes of one message that are taken


class ChannelTimeout(Exception):
    """Nothing came in time."""


class ChannelClosed(Exception):
    """The other side is gone."""


class MessageTooLong(Exception):
    """The other side began a message of more than MAX_MESSAGE_BYTES bytes."""


class Channel:
    """One stream. Deadlines are of time.monotonic."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._unsent = bytearray()
        stream.setblocking(False)

    def send(self, message: bytes, deadline: float) -> None:
        """Raises ChannelTimeout or ChannelClosed. What is not sent in time is sent by the next call."""
        self._unsent += struct.pack("<I", len(message)) + message
        self.flush(deadline)

    def flush(self, deadline: float) -> None:
        """Sends what an earlier call could not. Raises ChannelTimeout or ChannelClosed."""
        while self._unsent:
            try:
                del self._unsent[: self._stream.send(self._unsent)]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError:
                raise ChannelClosed from None

    def receive(self, deadline: float) -> bytes:
        """The next message. Raises ChannelTimeout, ChannelClosed or MessageTooLong; after ChannelTimeout a next call
        goes on."""
        while (message := self._pop_message()) is None:
            try:
                more = self._stream.recv(1 << 18)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError:
                raise ChannelClosed from None
            if not more:
                raise ChannelClosed
            self._buffer += more
            if time.monotonic() > deadline and not self._is_complete():  # also where a little always comes
                raise ChannelTimeout
        return message

    def _pop_message(self) -> bytes | None:
        if not self._is_complete():
            return None
        end = HEADER_BYTES + self._length()
        message = bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        return message

    def _is_complete(self) -> bool:
        """Whether a whole message has come. Raises MessageTooLong."""
        return len(self._buffer) >= HEADER_BYTES and len(self._buffer) >= HEADER_BYTES + self._length()

    def _length(self) -> int:
        length: int = struct.unpack_from("<I", self._buffer)[0]
        if length > MAX_MESSAGE_BYTES:
            raise MessageTooLong
        return length

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._stream, event)
        if not poll.poll(max(0.0, 1e3 * (deadline - time.monotonic()))):
            raise ChannelTimeout

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
