"""Waiting for work on Redis: a connection on which a call is blocked until somebody rings, or a few seconds.

Behind that call another one may be waiting already: the take that would follow. The server runs it as soon as the
first one ends, so a message is leased without a further round trip. It is a call like any other: what it takes is
leased, and its answer, which may come at any time, has to be collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Final, NamedTuple

from kq.backends.redis_answer import Answers
from kq.backends.redis_command import Head
from kq.backends.redis_connection import Connection
from kq.backends.redis_error import Broken
from kq.backends.redis_key import bell_key
from kq.backends.store import Ahead
from kq.waker import Lookout, Waker

#: Seconds that the server holds a blocked call; also how soon a dead connection is noticed.
_BLOCK: Final = 3.0
_BLPOP: Final = Head("BLPOP")
_CLIENT: Final = Head("CLIENT")


class Ring(NamedTuple):
    """What the end of a blocked call has brought.

    Attributes:
        queue: For which somebody has rung; None if nobody has.
        ahead: What was to be taken then, or None.
        taken: The take's answer, which may be an error.
        refusal: The error that the blocked call has ended with, or None.
    """

    queue: str | None
    ahead: Ahead | None
    taken: Any
    refusal: Exception | None


class Bell:
    """A connection that waits; a call may outlast one `wait`, and is answered in a later one.

    Args:
        connection: This one.
        waker: Ends a wait as well.

    Attributes:
        ahead: What is to be taken as soon as it is rung, or has been taken, and is not collected.
        number: By which the server knows the connection; None where it does not say, or lets nobody unblock it: then
            nothing can be taken ahead, for it could not be withdrawn.
    """

    def __init__(self, connection: Connection, waker: Waker) -> None:
        self._waker = waker
        self._connection = connection
        self._socket = connection.socket
        self._lookout = Lookout[Any](self._socket, waker)
        self._rung = Lookout[Any](self._socket)
        self._asked_at = 0.0
        self._asked: dict[bytes, str] = {}
        self.ahead: Ahead | None = None
        number = self._ask(_CLIENT.pack(("ID",)))
        can = isinstance(number, int) and isinstance(self._ask(unblock(number)), int)
        self.number: int | None = number if can else None

    @property
    def is_of_parent(self) -> bool:
        """Whether a process waits on it that has forked this one."""
        return self._connection.is_of_parent

    @property
    def is_asked(self) -> bool:
        """Whether a call waits for its answer."""
        return bool(self._asked)

    def covers(self, queues: Sequence[str]) -> bool:
        """Tell whether the call that waits for its answer, if there is one, listens for all of these."""
        return not self._asked or set(queues).issubset(self._asked.values())

    def wait(self, queues: Sequence[str], timeout: float, ahead: Ahead | None, take: bytes) -> Ring | None:
        """Wait until somebody rings, the waker wakes, or ``timeout`` seconds.

        Args:
            queues: What to listen for; an earlier call that is not answered yet may listen for others.
            timeout: Seconds.
            ahead: What ``take`` is; None for nothing.
            take: The call that is to follow.

        Raises:
            RedisError, OSError: If the connection breaks.
        """
        if not self._asked and queues:
            self._asked = {bell_key(queue).encode(): queue for queue in queues}
            self.ahead = None if self.number is None else ahead
            call = _BLPOP.pack((*self._asked, b"%g" % _BLOCK))
            self._socket.sendall(call if self.ahead is None else call + take)
            self._asked_at = monotonic()
        ready = self._lookout.ready(timeout)
        if self._waker in ready:
            self._waker.drain()
        if self._socket in ready:
            return self._answer()
        if self._asked and monotonic() - self._asked_at > _BLOCK + 2.0:
            # The server answers at the latest after _BLOCK: this connection is dead.
            raise Broken("no answer to a blocked call")
        return None

    def collect(self, patience: float = 0.0) -> Ring | None:
        """Return what has been answered meanwhile, or is within ``patience`` seconds."""
        return self._answer() if self.is_asked and self._rung.ready(patience) else None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _answer(self) -> Ring:
        source = Answers(self._socket)
        answer = source.read()
        taken = None if self.ahead is None else source.read()
        asked, self._asked = self._asked, {}
        ahead, self.ahead = self.ahead, None
        if isinstance(answer, Exception):
            return Ring(None, ahead, taken, answer)
        return Ring(asked[answer[0]] if answer else None, ahead, taken, None)

    def _ask(self, call: bytes) -> Any:
        self._socket.sendall(call)
        return Answers(self._socket).read()


def unblock(number: int) -> bytes:
    """Return the call that ends the blocked call of a connection."""
    return _CLIENT.pack(("UNBLOCK", number))
