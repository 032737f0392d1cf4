"""Group commit: threads that publish at the same moment share one round trip.

The first thread to arrive becomes the leader and publishes everything that waits, its own and the
others'; those that arrive meanwhile form the next group. A lone publisher pays nothing for it, and
sixteen threads cost the broker about as much as one. The term and the idea are the databases'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition
from time import monotonic

from kq.backend import Publication
from kq.errors import Error, Internal
from kq.shield import shielded

Commit = Callable[[Sequence[Publication], float], list[Error | None]]

#: Publications that one group carries at most, so that no thread waits on a crowd's behalf.
MAX_GROUP = 5000


class _Ticket:
    """One caller's publications, and what became of them."""

    __slots__ = ("batch", "deadline", "results")

    def __init__(self, batch: Sequence[Publication], deadline: float) -> None:
        self.batch = batch
        self.deadline = deadline
        self.results: list[Error | None] | None = None


class GroupCommit:
    """Runs ``commit`` in one thread at a time, for everybody who waits. Thread-safe."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._turn = Condition()
        self._waiting: list[_Ticket] = []
        self._busy = False

    def publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """Publish ``batch`` and return one result for each; blocks at most ``timeout`` seconds."""
        # A handler's time limit must not strike in here: others wait for the lock and the connection.
        with shielded():
            return self._publish(batch, timeout)

    def _publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        ticket = _Ticket(batch, monotonic() + timeout)
        with self._turn:
            self._waiting.append(ticket)
            while self._busy and ticket.results is None:
                left = ticket.deadline - monotonic()
                if left <= 0 or not self._turn.wait(left):
                    if ticket in self._waiting:
                        self._waiting.remove(ticket)
                        return _late(ticket)
                    if ticket.results is None and ticket.deadline <= monotonic():
                        return _late(ticket)
            if ticket.results is not None:
                return ticket.results
            group = self._take(ticket)
            self._busy = True
        try:
            self._lead(group)
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()
        assert ticket.results is not None
        return ticket.results

    def _take(self, mine: _Ticket) -> list[_Ticket]:
        """Take the next group off the waiting list; the leader's own ticket is always in it."""
        self._waiting.remove(mine)
        group, size = [mine], len(mine.batch)
        while self._waiting and size + len(self._waiting[0].batch) <= MAX_GROUP:
            ticket = self._waiting.pop(0)
            group.append(ticket)
            size += len(ticket.batch)
        return group

    def _lead(self, group: list[_Ticket]) -> None:
        batch = [publication for ticket in group for publication in ticket.batch]
        # The earliest deadline binds the group: nobody is kept longer than it asked for.
        timeout = max(0.0, min(ticket.deadline for ticket in group) - monotonic())
        try:
            results = self._commit(batch, timeout)
        except Error as error:
            results = [error] * len(batch)
        except BaseException as error:
            failed = Internal(f"publishing was interrupted by {error!r}", details={"reason": "unavailable"})
            self._deal(group, [failed] * len(batch))
            raise
        self._deal(group, results)

    @staticmethod
    def _deal(group: list[_Ticket], results: list[Error | None]) -> None:
        start = 0
        for ticket in group:
            end = start + len(ticket.batch)
            ticket.results = results[start:end]
            start = end


def _late(ticket: _Ticket) -> list[Error | None]:
    return [
        Internal("the broker did not confirm in time; the message may arrive", details={"reason": "timeout"})
        for _ in ticket.batch
    ]
