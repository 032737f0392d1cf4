"""Commands that have been sent to a Redis server, and whose answers nobody stands waiting for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kq.backends.redis_answer import Answers
from kq.backends.redis_connection import Connection
from kq.backends.redis_error import Broken


class Sent:
    """Such commands: each stores messages and is answered with a line. Owned by one thread.

    It has the connection until it is closed, or nobody has it any more.

    Args:
        line: Over which they are sent. It does not block.
        commands: What there has been no room for so far.
        numbers: How many messages each is to store, which is its answer then.
        put_away: What becomes of the connection once all have been answered.
    """

    __slots__ = ("_answers", "_commands", "_is_free", "_line", "_missing", "_put_away", "_stored")

    def __init__(
        self, line: Connection, commands: memoryview, numbers: Sequence[int], put_away: Callable[[Connection], None]
    ) -> None:
        self._line = line
        self._commands = commands
        self._put_away = put_away
        self._answers = Answers(line.socket)
        #: The numbers of the commands that have not been answered, the next one last.
        self._missing = list(reversed(numbers))
        #: For each message of the others, whether it is stored.
        self._stored: list[bool] = []
        self._is_free = False

    def fileno(self) -> int:
        """See `kq.backend.Unconfirmed`."""
        return self._line.socket.fileno()

    def write(self) -> bool:
        """See `kq.backend.Unconfirmed`."""
        while self._commands:
            try:
                self._commands = self._commands[self._line.socket.send(self._commands) :]
            except self._line.not_now:
                return False
            except OSError:
                # Whoever reads meets it as well.
                self._commands = self._commands[:0]
        return True

    def confirm(self) -> list[bool] | None:
        """See `kq.backend.Unconfirmed`."""
        try:
            while self._missing:
                answer = self._answers.read()
                number = self._missing.pop()
                self._stored += [answer == number] * number
        except self._line.not_now:
            # What there is of a line is kept.
            return None
        except (OSError, Broken):
            return self._stored + [False] * sum(self._missing)
        self._is_free = all(self._stored)
        return self._stored

    def close(self) -> None:
        """See `kq.backend.Unconfirmed`."""
        if self._is_free:
            self._put_away(self._line)
        else:
            # What is answered now would be taken for the next call's. What has gone wrong is met again, and seen to,
            # by whoever publishes the messages once more.
            self._line.close()
