"""Whom Redis has woken up: the queues for which somebody has rung, and what was taken behind the blocked call."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from time import monotonic
from typing import Final

from kq.backends.redis_bell import Bell, Ring, unblock
from kq.backends.redis_command import Head
from kq.backends.redis_connection import Connection
from kq.backends.redis_error import Late, RedisErrors, Refusal
from kq.backends.redis_key import bell_key
from kq.backends.redis_line import Lines
from kq.backends.redis_take import Taker
from kq.backends.store import Ahead, Taken
from kq.backends.within import within
from kq.waker import Lookout, Waker

#: Seconds after which a blocked call that has not ended is told so again.
_TOLD_AGAIN: Final = 0.05
_RPUSH: Final = Head("RPUSH")


class Watch:
    """Waits until there may be something to take. For one thread, but for `wake`.

    Args:
        connect: Makes the connection that is waited on.
        lines: Over which others are told.
        taker: Whose takes stand behind the blocked calls.
        errors: What says what goes wrong.
    """

    def __init__(
        self, connect: Callable[[], Connection], lines: Lines, taker: Taker, errors: RedisErrors
    ) -> None:  # fmt: skip
        self._connect = connect
        self._lines = lines
        self._taker = taker
        self._errors = errors
        self._bell: Bell | None = None
        #: Queues for which somebody has rung and which `wait` has not returned, and what is to be collected.
        self._rung: set[str] = set()
        self._early: list[tuple[Ahead, Taken]] = []
        self._waker = Waker()

    @property
    def ahead(self) -> Ahead | None:
        """See `Store.ahead`."""
        return None if self._bell is None else self._bell.ahead

    def wait(self, queues: Sequence[str], timeout: float, ahead: Ahead | None) -> list[str]:
        """See `Store.wait`."""
        self._leave_to_parent()
        with self._errors:
            if self._bell is None and queues:
                # In the thread that renews leases: what it waits for must come to an end.
                connection = within(self._lines.timeout, self._connect, Connection.close)
                self._bell = Bell(connection, self._waker)
            if self._bell is None:
                Lookout(self._waker).ready(timeout)
                self._waker.drain()
            elif not self._rung:
                try:
                    if self._bell.number is not None and not self._bell.covers(queues):
                        # There is room again in one that nobody listens to.
                        self._hear(self._withdrawn(self._bell))
                    if not (self._rung or self._early):
                        take = b"" if ahead is None or self._bell.is_asked else self._taker.packed(ahead)
                        self._hear(self._bell.wait(queues, timeout, ahead, take))
                except BaseException:
                    self._drop_bell()
                    raise
            if not self._rung:
                return []
            found = sorted(self._rung.intersection(queues))
            self._pass_on(self._rung.difference(queues))
            return found

    def collect(self, *, withdraw: bool) -> list[tuple[Ahead, Taken]]:
        """See `Store.collect`."""
        self._leave_to_parent()
        bell = self._bell
        if bell is not None and bell.ahead is not None:
            with self._errors:
                try:
                    self._hear(self._withdrawn(bell) if withdraw else bell.collect())
                except BaseException:
                    self._drop_bell()
                    raise
        if withdraw and self._rung:
            with self._errors:
                self._pass_on(self._rung)
        early, self._early = self._early, []
        return early

    def wake(self) -> None:
        """See `Store.wake`."""
        self._waker.wake()

    def close(self) -> None:
        """Close what is waited on."""
        self._drop_bell()
        self._waker.close()

    def _leave_to_parent(self) -> None:
        """Forget a bell of a process that has forked this one, and what it has heard and taken."""
        if self._bell is not None and self._bell.is_of_parent:
            self._bell = None
            self._rung.clear()
            self._early.clear()

    def _withdrawn(self, bell: Bell) -> Ring:
        assert bell.number is not None
        until = monotonic() + self._lines.timeout
        while monotonic() < until:
            # Once more where the server has read this before it read what it is to end.
            self._lines.ask([unblock(bell.number)])
            ring = bell.collect(_TOLD_AGAIN)
            if ring is not None:
                return ring
        # What it has taken, if anything, comes back when its lease ends.
        raise Late("a blocked call does not end")

    def _drop_bell(self) -> None:
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()

    def _hear(self, ring: Ring | None) -> None:
        if ring is None:
            return
        if ring.queue is not None:
            self._rung.add(ring.queue)
        if ring.ahead is not None:
            queue = ring.ahead.queue
            if isinstance(ring.taken, Exception):
                # Whoever looks into the queue meets the error, or none: a server forgets scripts.
                self._rung.add(queue)
            else:
                self._early.append((ring.ahead, self._taker.taken(queue, ring.taken)))
                self._rung.discard(queue)
        if ring.refusal is not None:
            raise ring.refusal

    def _pass_on(self, queues: Set[str]) -> None:
        """Ring for queues that we cannot follow now: somebody else may."""
        found = sorted(queues)
        self._rung.clear()
        for queue in found:
            (answer,) = self._lines.ask([_RPUSH.pack((bell_key(queue), "1"))])
            # On a full server whoever looks next without being woken finds the work.
            if isinstance(answer, Exception) and not (isinstance(answer, Refusal) and answer.code == "OOM"):
                raise answer
