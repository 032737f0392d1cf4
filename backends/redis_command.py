"""Writes commands as a Redis server reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

#: Bytes from which on sending something by itself takes less than copying it.
LONG: Final = 65536


class Head:
    """What commands begin with.

    Args:
        words: The first of each.
    """

    __slots__ = ("_count", "_data")

    def __init__(self, *words: str) -> None:
        self._count = len(words)
        self._data = b"".join(_parts(words))

    def pack(self, items: Sequence[bytes | str | int]) -> bytes:
        """Return a command as Redis reads it."""
        return b"".join(self._parts(items))

    def pieces(self, calls: Iterable[Sequence[bytes | str | int]]) -> list[bytes]:
        """Return commands as Redis reads them, all in one piece but for what is long, which is not copied."""
        pieces: list[bytes] = []
        parts: list[bytes] = []
        for items in calls:
            parts += self._parts(items)
        if max(map(len, parts)) < LONG:
            return [b"".join(parts)]
        short: list[bytes] = []
        for part in parts:
            if len(part) < LONG:
                short.append(part)
            else:
                pieces += (b"".join(short), part)
                short = []
        return [*pieces, b"".join(short)]

    def _parts(self, items: Sequence[bytes | str | int]) -> list[bytes]:
        return _parts(items, b"*%d\r\n%b" % (self._count + len(items), self._data))


def _parts(items: Sequence[bytes | str | int], head: bytes = b"") -> list[bytes]:
    parts = [head]
    for item in items:
        data = item if isinstance(item, bytes) else item.encode() if isinstance(item, str) else b"%d" % item
        parts += (b"$%d\r\n" % len(data), data, b"\r\n")
    return parts
