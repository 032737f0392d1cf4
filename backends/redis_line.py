"""Connections of redis-py's, spoken on directly: `Lines` for calls, `Bell` for what may take a while to be answered.

redis-py's own way of making a call takes as long as the call: it asks the pool, the system, the retry policy and the
metrics each time. Connecting, encryption and signing in are redis-py's here as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Final

import redis
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import TimeoutError as Late

from kq.backends.redis_answer import Answers
from kq.waker import Lookout, Waker

#: Seconds that the server holds a blocked wake-up call; also how soon a dead connection is noticed.
_BLOCK: Final = 3.0


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


class Bell:
    """A connection that waits for wake-ups; a call may outlast one `wait` and is answered in a later one.

    Args:
        pool: Makes it.
        key_of: Returns the key on which it is rung for a queue.
    """

    def __init__(self, pool: redis.ConnectionPool, key_of: Callable[[str], str]) -> None:
        self._key_of = key_of
        connection: Any = pool.make_connection()
        connection.connect()
        self._connection = connection
        self._asked_at = 0.0
        self._asked: dict[bytes, str] = {}

    def wait(self, queues: Sequence[str], waker: Waker, timeout: float) -> set[str]:
        """Return the queues that were rung for; they may be others than those asked for now."""
        if not self._asked and queues:
            self._asked = {self._key_of(queue).encode(): queue for queue in queues}
            self._connection.send_command("BLPOP", *self._asked, _BLOCK)
            self._asked_at = monotonic()
        # redis-py has no public way to wait on a connection together with something else.
        sources = [self._connection._sock, waker] if self._asked else [waker]
        ready = Lookout[Any](*sources).ready(timeout)
        if waker in ready:
            waker.drain()
        if self._connection._sock not in ready:
            if self._asked and monotonic() - self._asked_at > _BLOCK + 2.0:
                # The server answers at the latest after _BLOCK: this connection is dead.
                raise Broken("no answer to a blocked call")
            return set()
        answer = Answers(self._connection._sock).read()
        if isinstance(answer, Exception):
            raise answer
        asked, self._asked = self._asked, {}
        return {asked[answer[0]]} if answer else set()

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()
