"""Values as bytes, so that no two values give the same: what a MAC is made of.

A letter for the type; then 8 bytes of value, or a length of 4 bytes and what it counts. All big-endian::

    n                null
    t  f             true, false
    i  8 bytes       integer, two's complement
    d  8 bytes       float, IEEE 754
    s  length UTF-8  text
    b  length bytes  bytes
    l  length items  list; the length counts items
    m  length pairs  mapping; the length counts pairs, sorted by the keys' UTF-8

These are the types that a message's headers have on every broker. 1, 1.0, true and "1" differ, and so do 0.0
and -0.0; the order of a mapping does not count, and a tuple is a list.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Any

from kq.limit import MAX_NESTING

_size = Struct(">cI").pack
_integer = Struct(">cq").pack
_double = Struct(">cd").pack


class Uncoverable(Exception):
    """A value that has no bytes; the text says of which type it is, never the value."""


def encode(values: Iterable[Any]) -> bytes:
    """Return the bytes of values, one after the other.

    Raises:
        Uncoverable: If one of them is of another type, no 64-bit integer, no text or nested too deeply.
    """
    parts: list[bytes] = []
    for value in values:
        _write(parts, value, 1)
    return b"".join(parts)


def _write(parts: list[bytes], value: Any, depth: int) -> None:
    if isinstance(value, str):
        try:
            raw = value.encode()
        except UnicodeEncodeError:
            raise Uncoverable("text with a lone surrogate") from None
        parts += (_size(b"s", len(raw)), raw)
    elif value is None:
        parts.append(b"n")
    elif isinstance(value, bool):
        parts.append(b"t" if value else b"f")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise Uncoverable("an integer of more than 64 bits")
        parts.append(_integer(b"i", value))
    elif isinstance(value, float):
        parts.append(_double(b"d", value))
    elif isinstance(value, (bytes, bytearray)):
        parts += (_size(b"b", len(value)), bytes(value))
    elif depth > MAX_NESTING:
        raise Uncoverable(f"a value nested deeper than {MAX_NESTING} levels")
    elif isinstance(value, (list, tuple)):
        parts.append(_size(b"l", len(value)))
        for item in value:
            _write(parts, item, depth + 1)
    elif isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise Uncoverable("a mapping with keys that are no text")
        parts.append(_size(b"m", len(value)))
        # Python orders text by code points, and so UTF-8 by its bytes.
        for key in sorted(value):
            _write(parts, key, depth + 1)
            _write(parts, value[key], depth + 1)
    else:
        raise Uncoverable(f"a value of type {type(value).__name__}")
