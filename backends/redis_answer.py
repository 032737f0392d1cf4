"""Reads what a Redis server answers: its protocol's second version, from a socket that blocks.

From one that does not, a line may come in pieces, and be asked for again; what is longer may not.
"""

from __future__ import annotations

import socket
from typing import Any, Final

from kq.backends.redis_error import Broken, RedisError, Refusal

#: Bytes that one call asks for. Above this the allocator asks the system for memory each time.
_READ_SIZE: Final = 1 << 16

#: What errors begin with by which a server says that it serves nobody yet, or nobody more.
_NOT_NOW: Final = ("LOADING ", "MASTERDOWN ", "ERR max number of clients")


class Answers:
    """The answers on one socket, one after the other."""

    def __init__(self, source: socket.socket) -> None:
        self._receive = source.recv
        self._data = b""
        self._at = 0

    def read(self) -> Any:
        """Return an answer: an int, bytes, None, a list of such, or the exception that an error is.

        Raises:
            Broken: If the server closes the connection, or says what is no answer.
            TimeoutError: If nothing comes in time.
            OSError: If the connection breaks.
        """
        try:
            return self._read()
        except (ValueError, RecursionError):
            # The line that was read last.
            raise _no_answer(self._data[: self._at - 2].rpartition(b"\r\n")[2]) from None

    def _read(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self._exactly(_size(rest))
        if kind == b"*":
            return None if rest == b"-1" else [self._read() for _ in range(_size(rest))]
        if kind == b"+":
            return rest
        if kind == b"-":
            return error_of(rest)
        raise _no_answer(line)

    def _line(self) -> bytes:
        start = self._at
        while (end := self._data.find(b"\r\n", start)) < 0:
            # Where the last byte may be half of what is looked for.
            start = max(0, len(self._data) - self._at - 1)
            self._more()
        line = self._data[self._at : end]
        self._at = end + 2
        return line

    def _exactly(self, size: int) -> bytes:
        missing = self._at + size + 2 - len(self._data)
        if missing <= 0:
            end = self._at + size
            found = self._data[self._at : end]
            self._at = end + 2
            return found
        parts = [self._data[self._at :]]
        while missing > 0:
            parts.append(self._received())
            missing -= len(parts[-1])
        # The last part also has what comes next, or less than the two bytes that end this one. Joined without either,
        # a large one is not copied twice.
        last = parts[-1]
        end = len(last) + missing - 2
        if end >= 0:
            parts[-1] = last[:end]
            self._data, self._at = last, end + 2
            return b"".join(parts)
        self._data, self._at = last, len(last) + missing
        return b"".join(parts[:-1])[:size]

    def _more(self) -> None:
        data = self._received()
        self._data, self._at = self._data[self._at :] + data, 0

    def _received(self) -> bytes:
        data: bytes = self._receive(_READ_SIZE)
        if not data:
            raise Broken("the server closed the connection")
        return data


def _no_answer(line: bytes) -> Broken:
    return Broken(f"expected an answer of Redis, got {line[:20]!r}")


def _size(text: bytes) -> int:
    size = int(text)
    if size < 0:
        raise ValueError(text)
    return size


def error_of(text: bytes) -> RedisError:
    """Return the exception that an error of the server's is."""
    said = text.decode(errors="replace")
    return Broken(said) if said.startswith(_NOT_NOW) else Refusal(said)
