"""Calls to a Redis server, over as many connections as there are at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final

from kq.backends.redis_answer import Answers, error_of
from kq.backends.redis_command import Head
from kq.backends.redis_connection import Connection
from kq.backends.redis_error import Broken, Late, NoTransactions, RedisError, Refusal, as_met, is_read_only
from kq.backends.within import within

#: Seconds that a connection, or an answer, is waited for even where what came before it has taken all the time.
_LEAST: Final = 0.01


class Lines:
    """As many connections as there are calls at once. Thread-safe.

    Args:
        connect: Makes one.
        timeout: See below.

    Attributes:
        timeout: Seconds within which a call is to end that has to connect, or takes two round trips, too.
    """

    def __init__(self, connect: Callable[[], Connection], timeout: float) -> None:
        self._connect = connect
        self.timeout = timeout
        self._idle: list[Connection] = []
        self._closed = False

    def ask(self, commands: Sequence[bytes], number: int = 1) -> list[Any]:
        """Send commands in one go; return their answers.

        An answer may be a `Refusal`.

        A connection that broke while it was idle is opened anew, and the commands are sent once more.

        Args:
            commands: As `Head.pack` and `Head.pieces` make them.
            number: How many they are.

        Raises:
            RedisError: If the server cannot be reached or does not answer in time.
        """
        line, answers = self._first(commands, number)
        self._put_away(line)
        return answers

    def spare(self) -> Connection | None:
        """Return a connection that is there, and does not block; None where there is none. To be put back."""
        line = _pop(self._idle)
        if line is None:
            return None
        if line.is_of_parent:
            # Whoever waits for a connection sees to that.
            self._idle.append(line)
            return None
        _wait(line, 0)
        return line

    def put_back(self, line: Connection) -> None:
        """Take a connection back on which nothing is under way; whoever uses it next says whether it is to block."""
        self._put_away(line)

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
            RedisError: As with `ask`; or what was answered to the condition, or to a command that kept all of
                them from being run.
        """
        began = monotonic()
        line, (answer, begun) = self._first([condition + _MULTI], 2)
        if isinstance(begun, Exception) or answer != 1:
            # By this the server forgets that a transaction was begun.
            line.close()
            if isinstance(answer, Exception):
                raise answer
            if isinstance(begun, Exception):
                raise NoTransactions(str(begun))
            return answer, []
        *queued, answers = self._exchange_by(began, line, [*commands, _EXEC], number + 1)
        if isinstance(answers, Exception):
            line.close()
            for error in queued:
                if isinstance(error, Exception):
                    raise error
            _, _, reason = str(answers).partition("discarded because of: ")
            error = error_of(reason.encode()) if reason else answers
            is_denied = isinstance(error, Refusal) and error.code == "NOPERM"
            raise NoTransactions(str(answers)) if is_denied else error
        self._put_away(line)
        return answer, list(answers)

    def close(self) -> None:
        """Close the connections; those in use when their call has ended."""
        self._closed = True
        # Others may be closing them as well.
        while (line := _pop(self._idle)) is not None:
            line.close()

    def _first(self, commands: Sequence[bytes], number: int) -> tuple[Connection, list[Any]]:
        """Return a connection, and what was answered on it."""
        began = monotonic()
        line = _pop(self._idle)
        if line is not None and line.is_of_parent:
            # What it says there is the parent's business.
            self._idle.clear()
            line = None
        if line is not None:
            # Not with `suppress`, which takes as long as all else here.
            try:
                _wait(line, self.timeout)
                return line, self._exchange(line, commands, number)
            except Broken:
                pass
        try:
            line = within(self._left(began), self._connect, Connection.close)
        except TimeoutError:
            raise Late(f"no connection within {self.timeout:g} s") from None
        return line, self._exchange_by(began, line, commands, number)

    def _left(self, began: float) -> float:
        return max(_LEAST, self.timeout - (monotonic() - began))

    def _exchange_by(self, began: float, line: Connection, commands: Sequence[bytes], number: int) -> list[Any]:
        """Send commands, and return their answers, within what is left of a call's time."""
        line.socket.settimeout(self._left(began))
        answers = self._exchange(line, commands, number)
        if not line.is_closed:
            line.socket.settimeout(self.timeout)
        return answers

    def _put_away(self, line: Connection) -> None:
        if line.is_closed:
            return
        self._idle.append(line)
        if self._closed:
            self.close()

    def _exchange(self, line: Connection, commands: Sequence[bytes], number: int) -> list[Any]:
        connected = line.socket
        try:
            for piece in commands:
                connected.sendall(piece)
            source = Answers(connected)
            answers = [source.read() for _ in range(number)]
            for answer in answers:
                if isinstance(answer, RedisError):
                    if isinstance(answer, Broken):
                        raise answer
                    if is_read_only(answer):
                        # Another server is the one to write to now, and the same name may lead there.
                        line.close()
        except BaseException as error:
            # Whatever is answered now would be taken for the next call's.
            line.close()
            raise as_met(error, f"no answer within {connected.gettimeout():.2g} s") from None
        return answers


def _wait(line: Connection, seconds: float) -> None:
    """Have calls wait so long at most: as most do already, and to say so is a call of the system's."""
    if line.socket.gettimeout() != seconds:
        line.socket.settimeout(seconds)


def _pop(lines: list[Connection]) -> Connection | None:
    try:
        return lines.pop()
    except IndexError:
        return None


_MULTI: Final = Head("MULTI").pack(())
_EXEC: Final = Head("EXEC").pack(())
