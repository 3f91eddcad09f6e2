"""The trusted side of a stream of messages: every wait has a deadline, and every message a maximum length. The confined
side is `frames.py`."""

from __future__ import annotations

import select
import socket
import struct
import time

from lowrank_tune.rewards.sandbox.frames import HEADER_BYTES

MAX_MESSAGE_BYTES = 4 << 20  # bytes of one message that is accepted


class ChannelTimeout(Exception):
    """Nothing was received in time."""


class ChannelClosed(Exception):
    """The other side has closed the stream."""


class MessageTooLong(Exception):
    """The other side began a message of more than MAX_MESSAGE_BYTES bytes."""


class Channel:
    """One stream. Deadlines are times of time.monotonic."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._unsent = bytearray()
        stream.setblocking(False)

    def send(self, message: bytes, deadline: float) -> None:
        """Sends a message. What is not sent in time is sent by the next call. Raises ChannelTimeout or
        ChannelClosed."""
        self._unsent += struct.pack("<I", len(message)) + message
        self.flush(deadline)

    def flush(self, deadline: float) -> None:
        """Sends what an earlier call could not send. Raises ChannelTimeout or ChannelClosed."""
        while self._unsent:
            try:
                num_sent = self._stream.send(self._unsent)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError:
                raise ChannelClosed from None
            else:
                del self._unsent[:num_sent]

    def receive(self, deadline: float) -> bytes:
        """Returns the next message. Raises ChannelTimeout, ChannelClosed or MessageTooLong; after ChannelTimeout the
        next call continues."""
        while (message := self._pop_message()) is None:
            try:
                received = self._stream.recv(1 << 18)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError:
                raise ChannelClosed from None
            if not received:
                raise ChannelClosed
            self._buffer += received
            # also if the other side sends a few bytes again and again
            if time.monotonic() > deadline and not self._is_complete():
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
        """Returns whether a whole message was received. Raises MessageTooLong."""
        num_received = len(self._buffer)
        return num_received >= HEADER_BYTES and num_received >= HEADER_BYTES + self._length()

    def _length(self) -> int:
        length: int = struct.unpack_from("<I", self._buffer)[0]
        if length > MAX_MESSAGE_BYTES:
            raise MessageTooLong
        return length

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._stream, event)
        timeout_ms = max(0.0, 1e3 * (deadline - time.monotonic()))
        if not poll.poll(timeout_ms):
            raise ChannelTimeout

    def closed(self) -> bool:
        """Returns whether the other side has closed the stream."""
        try:
            return self._stream.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._stream.close()
