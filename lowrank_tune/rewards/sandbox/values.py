"""Encodes plain values as bytes and decodes them. Decoded values have exact types of the standard library, so no code
runs when they are compared.

Only exact types are encoded. An object of any other type, also of a subclass, is passed to `to_handle`, which returns a
number for it or refuses it.
"""

from __future__ import annotations

import struct
import sys

TYPE_CHECKING = False  # the imports below would take longer than the whole start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    ToHandle = Callable[[Any], int]
    FromHandle = Callable[[int], Any]

MAX_DEPTH = 100  # levels of nesting
CONTAINERS: dict[type, bytes] = {
    list: b"l",
    tuple: b"t",
    set: b"S",
    frozenset: b"Z",
}
TYPE_TAGS = {
    type(None): b"N",
    bool: b"B",
    int: b"i",
    float: b"d",
    complex: b"c",
    str: b"s",
    bytes: b"b",
    bytearray: b"y",
    dict: b"m",
    range: b"r",
    type(Ellipsis): b"E",
    type: b"T",
    **CONTAINERS,
}
TYPES_BY_NAME = {value_type.__name__: value_type for value_type in TYPE_TAGS if value_type is not type}
"""Types that are values themselves: a test may pass `int` as an argument."""
LIBRARY_TYPES: dict[bytes, tuple[str, str]] = {
    b"C": ("collections", "Counter"),
    b"O": ("collections", "OrderedDict"),
    b"Q": ("collections", "deque"),
    b"D": ("collections", "defaultdict"),
    b"X": ("decimal", "Decimal"),
    b"F": ("fractions", "Fraction"),
}
"""Types that can only occur if their module was imported."""


class NotSerializable(Exception):
    """A value that cannot be encoded; the message has its type."""


class DeserializationError(Exception):
    """Bytes that are not an encoded value."""


def refuse(value: Any) -> int:
    """The `to_handle` for plain values only. Raises NotSerializable."""
    raise NotSerializable(f"a {type(value).__name__}")


def encode(value: Any, to_handle: ToHandle = refuse) -> bytes:
    """Returns a value as bytes. Raises NotSerializable if `to_handle` does, and for a value that is nested too deeply
    or contains itself."""
    parts: list[bytes] = []
    _write(value, parts, to_handle, 0)
    return b"".join(parts)


def _write(
    value: Any,
    parts: list[bytes],
    to_handle: ToHandle,
    depth: int,
) -> None:
    if depth > MAX_DEPTH:
        raise NotSerializable("a value that is nested too deeply")
    kind = TYPE_TAGS.get(type(value)) or _library_kind(value)
    if kind is None or (kind == b"T" and TYPES_BY_NAME.get(value.__name__) is not value):
        parts.append(b"o%d;" % to_handle(value))
    elif kind in b"mCOD":
        parts.append(b"%s%d;" % (kind, len(value)))
        for pair in value.items():
            _write(pair[0], parts, to_handle, depth + 1)
            _write(pair[1], parts, to_handle, depth + 1)
    elif kind in b"ltSZQ":
        parts.append(b"%s%d;" % (kind, len(value)))
        for element in value:
            _write(element, parts, to_handle, depth + 1)
    else:
        parts.append(kind + _leaf(kind, value))


def _library_kind(value: Any) -> bytes | None:
    for kind, (module, name) in LIBRARY_TYPES.items():
        if module in sys.modules and type(value) is getattr(
            sys.modules[module],
            name,
            None,
        ):
            return kind
    return None


def _leaf(kind: bytes, value: Any) -> bytes:
    if kind in b"NE":
        return b""
    if kind == b"B":
        return b"1" if value else b"0"
    if kind == b"i":
        # hexadecimal: without a limit of digits, and fast for long numbers
        return b"%s;" % format(value, "x").encode()
    if kind == b"d":
        return struct.pack("<d", value)
    if kind == b"c":
        return struct.pack("<dd", value.real, value.imag)
    if kind == b"r":
        return b"".join(_leaf(b"i", part) for part in (value.start, value.stop, value.step))
    if kind in b"by":
        return b"%d;%s" % (len(value), bytes(value))
    # the name of a type; Decimal and Fraction as text
    text = value.__name__ if kind == b"T" else str(value)
    encoded = text.encode("utf-8", "surrogatepass")
    return b"%d;%s" % (len(encoded), encoded)


def decode(data: bytes, from_handle: FromHandle | None = None) -> Any:
    """Returns the value; `from_handle` returns the object for the number of a handle. Raises DeserializationError for
    anything that `encode` does not write."""
    reader = Deserializer(data, from_handle)
    try:
        value = reader.value(0)
    except (ValueError, TypeError, KeyError, struct.error, ArithmeticError) as error:
        raise DeserializationError(f"{type(error).__name__}: {error}") from None
    if reader.position != len(data):
        raise DeserializationError("there are more bytes after the value")
    return value


class Deserializer:
    """Decodes one value from `data`, from `position` on."""

    def __init__(self, data: bytes, from_handle: FromHandle | None) -> None:
        self.data = data
        self.from_handle = from_handle
        self.position = 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.position + count > len(self.data):
            raise DeserializationError("it ends too early")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, base: int = 10) -> int:
        end = self.data.find(b";", self.position)
        if end < 0:
            raise DeserializationError("a number has no end")
        text = self.take(end - self.position)
        self.position += 1
        # int() would accept spaces and underscores too
        if not text.lstrip(b"-").isalnum():
            raise DeserializationError("it has an invalid number")
        return int(text, base)

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise DeserializationError("it is nested too deeply")
        kind = self.take(1)
        if kind in b"mCOD":
            pairs = [(self.value(depth + 1), self.value(depth + 1)) for _ in range(self.number())]
            return self._mapping(kind, pairs)
        if kind in b"ltSZQ":
            items = [self.value(depth + 1) for _ in range(self.number())]
            if kind != b"Q":
                return next((make(items) for make, tag in CONTAINERS.items() if tag == kind), None)
            return library_type(kind)(items)
        return self._leaf(kind)

    def _mapping(self, kind: bytes, pairs: list[tuple[Any, Any]]) -> Any:
        if kind == b"m":
            return dict(pairs)
        if kind == b"D":
            return library_type(kind)(None, pairs)
        if kind == b"C":
            return library_type(kind)(dict(pairs))
        return library_type(kind)(pairs)

    def _leaf(self, kind: bytes) -> Any:
        if kind in b"NE":
            return None if kind == b"N" else ...
        if kind == b"B":
            return {b"1": True, b"0": False}[self.take(1)]
        if kind == b"i":
            return self.number(16)
        if kind == b"d":
            return struct.unpack("<d", self.take(8))[0]
        if kind == b"c":
            return complex(*struct.unpack("<dd", self.take(16)))
        if kind == b"r":
            return range(self.number(16), self.number(16), self.number(16))
        if kind == b"o" and self.from_handle is not None:
            return self.from_handle(self.number())
        if kind not in b"sbyXFT":
            raise DeserializationError(f"unknown kind {kind!r}")
        raw = self.take(self.number())
        if kind in b"by":
            return raw if kind == b"b" else bytearray(raw)
        text = raw.decode("utf-8", "surrogatepass")
        if kind == b"s":
            return text
        if kind == b"T":
            return TYPES_BY_NAME[text]
        return library_type(kind)(text)


def library_type(kind: bytes) -> Callable[..., Any]:
    """Returns the type of the standard library for a tag; imports its module."""
    module, name = LIBRARY_TYPES[kind]
    __import__(module)
    constructor: Callable[..., Any] = getattr(sys.modules[module], name)
    return constructor
