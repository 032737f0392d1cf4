"""Group commit: threads that publish at the same moment share one round trip.

The first thread to arrive becomes the leader and publishes everything that waits, its own and the
others'; those that arrive meanwhile form the next group. A lone publisher pays nothing for it, and
sixteen threads cost the broker about as much as one. The term and the idea are the databases'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition, RLock, Thread
from time import monotonic

from kq.backend import Publication
from kq.errors import Error, Internal
from kq.shield import shielding

Commit = Callable[[Sequence[Publication], float], list[Error | None]]

#: Publications that one group carries at most, so that no thread waits on a crowd's behalf.
MAX_GROUP = 5000

#: How much of its time a caller must have left to commit in its own thread.
_ENOUGH = 0.5


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
        # Entered with each message, so not through the condition, whose way in is Python. A signal's handler may
        # publish as well, in a thread that holds it.
        self._lock = RLock()
        self._turn = Condition(self._lock)
        self._waiting: list[_Ticket] = []
        self._busy = False
        #: Whether the last commit found the broker as it should be.
        self._proven = False

    def publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """Publish ``batch`` and return one result for each; blocks at most ``timeout`` seconds."""
        # A handler's time limit must not strike in here: others wait for the lock and the connection.
        shield = shielding()
        if shield is None:
            return self._publish(batch, timeout)
        with shield:
            return self._publish(batch, timeout)

    def _publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        if (results := self._publish_alone(batch, timeout)) is not None:
            return results
        ticket = _Ticket(batch, monotonic() + timeout)
        group: list[_Ticket] = []
        try:
            with self._lock:
                self._waiting.append(ticket)
                while self._busy and ticket.results is None:
                    left = ticket.deadline - monotonic()
                    if (left <= 0 or not self._turn.wait(left)) and self._gives_up(ticket):
                        return _late(ticket)
                if ticket.results is not None:
                    return ticket.results
                group = self._take(ticket)
                self._busy = True
                plain = self._proven and ticket.deadline - monotonic() > timeout * _ENOUGH
            if plain:
                self._lead(group, min(ticket.deadline for ticket in group))
            else:
                # From here on it is the other thread's, also where this one is interrupted.
                aside, group = group, []
                self._lead_aside(aside, ticket)
        except BaseException:
            self._let_go(group, ticket)
            raise
        return _late(ticket) if ticket.results is None else ticket.results

    def _publish_alone(self, batch: Sequence[Publication], timeout: float) -> list[Error | None] | None:
        """Publish where nobody else does; None, with nothing done, where somebody does."""
        mine = proven = False
        try:
            with self._lock:
                if self._busy or self._waiting or not self._proven:
                    return None
                self._busy = mine = True
            results = self._commit(batch, timeout)
            proven = not any(results) or not any(error is not None and error.retryable for error in results)
        except Error as error:
            results = [error] * len(batch)
            proven = not error.retryable
        finally:
            if mine:
                with self._lock:
                    self._busy, self._proven = False, proven
                    if self._waiting:
                        self._turn.notify_all()
        return results

    def _gives_up(self, ticket: _Ticket) -> bool:
        """Tell whether a caller whose time is over has to go without an answer."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            return True
        return ticket.results is None and ticket.deadline <= monotonic()

    def _lead_aside(self, group: list[_Ticket], mine: _Ticket) -> None:
        """Commit in a thread of its own, and wait for it no longer than the caller can.

        For where a call may take longer than it should: connecting, finding the broker's address, declaring a queue;
        or where the caller's time is nearly over, and that of the others is not.
        """
        failure: list[BaseException] = []

        def lead() -> None:
            try:
                self._lead(group, max(ticket.deadline for ticket in group))
            except BaseException as error:
                failure.append(error)
                self._let_go(group, mine)

        try:
            Thread(target=lead, name="kq-commit", daemon=True).start()
        except (RuntimeError, MemoryError):
            # No room for one more. Then here, however long it takes.
            lead()
        with self._lock:
            self._turn.wait_for(lambda: mine.results is not None or failure, mine.deadline - monotonic())
        if failure:
            raise failure[0]

    def _let_go(self, group: list[_Ticket], mine: _Ticket) -> None:
        """Leave nobody waiting behind a caller that was interrupted, and nothing of its own for others to publish."""
        with self._lock:
            if mine in self._waiting:
                self._waiting.remove(mine)
            if group and any(ticket.results is None for ticket in group):
                failed = Internal("publishing was interrupted", details={"reason": "unavailable"})
                self._deal(group, [failed for ticket in group for _ in ticket.batch])
                self._busy = False
            self._turn.notify_all()

    def _take(self, mine: _Ticket) -> list[_Ticket]:
        """Take the next group off the waiting list; the leader's own ticket is always in it."""
        self._waiting.remove(mine)
        group, size = [mine], len(mine.batch)
        while self._waiting and size + len(self._waiting[0].batch) <= MAX_GROUP:
            ticket = self._waiting.pop(0)
            group.append(ticket)
            size += len(ticket.batch)
        return group

    def _lead(self, group: list[_Ticket], deadline: float) -> None:
        batch = [publication for ticket in group for publication in ticket.batch]
        try:
            results = self._commit(batch, max(0.0, deadline - monotonic()))
        except Error as error:
            results = [error] * len(batch)
        with self._lock:
            self._proven = not any(result is not None and result.retryable for result in results)
            self._deal(group, results)
            self._busy = False
            self._turn.notify_all()

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
