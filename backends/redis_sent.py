"""Commands that are sent to a Redis server, and whose answers nobody stands waiting for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kq.backends.redis_answer import Answers
from kq.backends.redis_connection import Connection
from kq.backends.redis_error import Broken, Late, RedisErrors
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
        way: Likewise.
    """

    __slots__ = (
        "_answers", "_commands", "_errors", "_got", "_is_free", "_line", "_lines", "_numbers", "timeout", "way",
    )  # fmt: skip

    def __init__(
        self, line: Connection, commands: bytes, numbers: Sequence[int], lines: Lines, errors: RedisErrors
    ) -> None:
        self._line = line
        self.way: object = line
        self._lines = lines
        self._errors = errors
        self.timeout = lines.timeout
        #: What there has been no room for so far.
        self._commands = memoryview(commands)
        self._answers = Answers(line.socket)
        self._numbers = numbers
        #: What has been answered; None instead of what will not be.
        self._got: list[Any] = []
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
        got = self._got
        try:
            while len(got) < len(self._numbers):
                got.append(self._answers.read())
        except self._line.not_now:
            # What there is of a line is kept.
            return None
        except (OSError, Broken):
            got += [None] * (len(self._numbers) - len(got))
        # What an error says of the connection is not looked into here.
        self._is_free = all(isinstance(answer, int) for answer in got)
        return self._stored()

    def known(self) -> list[bool | None]:
        """See `kq.backend.Unconfirmed`."""
        stored = self._stored()
        return [*stored, *[None] * (sum(self._numbers) - len(stored))]

    def _stored(self) -> list[bool]:
        stored: list[bool] = []
        for number, answer in zip(self._numbers, self._got, strict=False):
            stored += [answer == number] * number
        return stored

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
