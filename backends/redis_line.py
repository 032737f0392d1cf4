"""Connections of redis-py's, spoken on directly.

redis-py's own way of making a call takes as long as the call: it asks the pool, the system, the retry policy and the
metrics each time. Connecting, encryption and signing in are redis-py's here as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import redis
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import NoPermissionError
from redis.exceptions import TimeoutError as Late

from kq.backends.redis_answer import Answers, error_of

#: Bytes from which on sending something by itself takes less than copying it.
LONG: Final = 65536


class NoTransactions(redis.ResponseError):
    """The server has none, or not for this account."""


class Lines:
    """As many connections as there are calls at once. Thread-safe."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        self._pool = pool
        #: Those that are open, and those that are not; the latter open at their next use.
        self._idle: list[Any] = []
        self._spare: list[Any] = []
        self._closed = False

    def ask(self, commands: Sequence[bytes], number: int = 1) -> list[Any]:
        """Send commands in one go; return their answers.

        An answer may be a `redis.ResponseError`.

        A connection that broke while it was idle is opened anew, and the commands are sent once more.

        Args:
            commands: As `Head.pack` and `Head.pieces` make them.
            number: How many they are.

        Raises:
            redis.RedisError: If the server cannot be reached or does not answer in time.
        """
        line, answers = self._first(commands, number)
        self._put_away(line)
        return answers

    def transact(self, condition: bytes, commands: Sequence[bytes], number: int) -> tuple[Any, list[Any]]:
        """Run commands in one step of the server's, without a script; return their answers.

        Args:
            condition: Asked before; unless it is answered with 1, nothing is run.
            commands: What to run then.
            number: How many they are.

        Returns:
            The condition's answer, and theirs, where they were run.

        Raises:
            NoTransactions: If there are none on this server, or for this account; nothing was run.
            redis.RedisError: As with `ask`; or what was answered to the condition, or to a command that kept all of
                them from being run.
        """
        line, (answer, begun) = self._first([condition + _MULTI], 2)
        if isinstance(begun, Exception) or answer != 1:
            # By this the server forgets that a transaction was begun.
            self._drop(line)
            if isinstance(answer, Exception):
                raise answer
            if isinstance(begun, Exception):
                raise NoTransactions(str(begun))
            return answer, []
        *queued, answers = self._exchange(line, [*commands, _EXEC], number + 1)
        if isinstance(answers, Exception):
            self._drop(line)
            for error in queued:
                if isinstance(error, Exception):
                    raise error
            _, _, reason = str(answers).partition("discarded because of: ")
            error = error_of(reason.encode()) if reason else answers
            raise NoTransactions(str(answers)) if isinstance(error, NoPermissionError) else error
        self._put_away(line)
        return answer, list(answers)

    def close(self) -> None:
        """Close the connections; those in use when their call has ended."""
        self._closed = True
        while self._idle:
            self._idle.pop().disconnect()

    def _first(self, commands: Sequence[bytes], number: int) -> tuple[Any, list[Any]]:
        """Return a connection, and what was answered on it."""
        line = _pop(self._idle)
        if line is not None:
            # Not with `suppress`, which takes as long as all else here.
            try:
                return line, self._exchange(line, commands, number)
            except Broken:
                pass
        line = _pop(self._spare) or self._pool.make_connection()
        return line, self._exchange(line, commands, number)

    def _put_away(self, line: Any) -> None:
        self._idle.append(line)
        if self._closed:
            self.close()

    def _drop(self, line: Any) -> None:
        line.disconnect()
        self._spare.append(line)

    def _exchange(self, line: Any, commands: Sequence[bytes], number: int) -> list[Any]:
        try:
            if line._sock is None:
                line.connect()
            for piece in commands:
                line._sock.sendall(piece)
            source = Answers(line._sock)
            answers = [source.read() for _ in range(number)]
            for answer in answers:
                if isinstance(answer, Broken):
                    raise answer
        except BaseException as error:
            # Whatever is answered now would be taken for the next call's.
            self._drop(line)
            if isinstance(error, TimeoutError):
                raise Late("no answer in time") from None
            if isinstance(error, OSError):
                raise Broken(str(error)) from None
            raise
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


_MULTI: Final = Head("MULTI").pack(())
_EXEC: Final = Head("EXEC").pack(())
