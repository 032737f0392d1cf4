"""Connections of redis-py's, spoken on directly.

redis-py's own way of making a call takes as long as the call: it asks the pool, the system, the retry policy and the
metrics each time. Connecting, encryption and signing in are redis-py's here as well.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import redis
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import TimeoutError as Late

from kq.backends.redis_answer import Answers


class Lines:
    """As many connections as there are calls at once. Thread-safe."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        #: Those that are open, and those that are not; the latter open at their next use.
        self._idle: list[Any] = []
        self._spare: list[Any] = []
        self._closed = threading.Event()

    def ask(self, commands: Sequence[bytes]) -> list[Any]:
        """Send commands, packed as `Head.pack` does, in one go; return their answers.

        An answer may be a `redis.ResponseError`.

        A connection that broke while it was idle is opened anew, and the commands are sent once more.

        Raises:
            redis.RedisError: If the server cannot be reached or does not answer in time.
        """
        data = commands[0] if len(commands) == 1 else b"".join(commands)
        line = _pop(self._idle)
        if line is not None:
            with suppress(Broken):
                return self._exchange(line, data, len(commands))
        line = _pop(self._spare) or self._pool.make_connection()
        return self._exchange(line, data, len(commands))

    def close(self) -> None:
        """Close the connections; those in use when their call has ended."""
        self._closed.set()
        while self._idle:
            self._idle.pop().disconnect()

    def _exchange(self, line: Any, data: bytes, number: int) -> list[Any]:
        try:
            if line._sock is None:
                line.connect()
            line._sock.sendall(data)
            source = Answers(line._sock)
            answers = [source.read() for _ in range(number)]
            for answer in answers:
                if isinstance(answer, Broken):
                    raise answer
        except BaseException as error:
            # Whatever is answered now would be taken for the next call's.
            line.disconnect()
            self._spare.append(line)
            if isinstance(error, TimeoutError):
                raise Late("no answer in time") from None
            if isinstance(error, OSError):
                raise Broken(str(error)) from None
            raise
        self._idle.append(line)
        if self._closed.is_set():
            self.close()
        return answers


def _pop(lines: list[Any]) -> Any:
    try:
        return lines.pop()
    except IndexError:
        return None


class Head:
    """What commands begin with.

    Args:
        words: The first of each.
    """

    __slots__ = ("_count", "_data")

    def __init__(self, *words: str) -> None:
        self._count = len(words)
        self._data = _packed(words)

    def pack(self, items: Sequence[bytes | str | int]) -> bytes:
        """Return a command as Redis reads it."""
        return _packed(items, b"*%d\r\n%b" % (self._count + len(items), self._data))


def _packed(items: Sequence[bytes | str | int], head: bytes = b"") -> bytes:
    parts = [head]
    for item in items:
        data = item if isinstance(item, bytes) else item.encode() if isinstance(item, str) else b"%d" % item
        parts += (b"$%d\r\n" % len(data), data, b"\r\n")
    return b"".join(parts)
