"""Commands that are sent to a Redis server, and whose answers nobody stands waiting for."""

from __future__ import annotations

from collections.abc import Sequence

from kq.backends.redis_answer import Answers
from kq.backends.redis_connection import Connection
from kq.backends.redis_error import Broken, Late, RedisError, RedisErrors
from kq.backends.redis_line import Lines
from kq.errors import Error


class Sent:
    """Such commands: each stores messages and is answered with a line. Owned by one thread.

    It has the connection until it is closed, or nobody has it any more.

    Args:
        line: Over which they are sent. It does not block.
        commands: What is sent.
        numbers: How many messages each is to store, which is its answer then.
        lines: Where the connection goes once all have been answered.
        errors: What says what goes wrong.

    Attributes:
        timeout: See `kq.backend.Unconfirmed`.
    """

    __slots__ = (
        "_answers", "_commands", "_errors", "_is_clean", "_is_free", "_line", "_lines", "_missing", "_stored",
        "timeout",
    )  # fmt: skip

    def __init__(
        self, line: Connection, commands: bytes, numbers: Sequence[int], lines: Lines, errors: RedisErrors
    ) -> None:
        self._line = line
        self._lines = lines
        self._errors = errors
        self.timeout = lines.timeout
        #: What there has been no room for so far.
        self._commands = memoryview(commands)
        self._answers = Answers(line.socket)
        #: The numbers of the commands that have not been answered, the next one last.
        self._missing = list(reversed(numbers))
        #: For each message of the others, whether it is stored.
        self._stored: list[bool] = []
        #: Whether nothing has gone wrong.
        self._is_clean = True
        #: Whether nothing is on its way over the connection.
        self._is_free = True

    def fileno(self) -> int:
        """See `kq.backend.Unconfirmed`."""
        return self._line.socket.fileno()

    def write(self) -> bool:
        """See `kq.backend.Unconfirmed`."""
        self._is_free = False
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
                # What an error says of the connection is not looked into here.
                self._is_clean = self._is_clean and not isinstance(answer, RedisError)
        except self._line.not_now:
            # What there is of a line is kept.
            return None
        except (OSError, Broken):
            self._is_clean = False
            self._stored += [False] * sum(self._missing)
            self._missing.clear()
        self._is_free = self._is_clean
        return self._stored

    def late(self) -> Error:
        """See `kq.backend.Unconfirmed`."""
        return self._errors.late(Late(f"no answer within {self.timeout:.2g} s"))

    def close(self) -> None:
        """See `kq.backend.Unconfirmed`."""
        if self._is_free:
            self._lines.put_back(self._line)
        else:
            # What is answered now would be taken for the next call's. What has gone wrong is met again, and seen to,
            # by whoever publishes the messages once more.
            self._line.close()
