"""Whose turn it is among the consumers of one queue."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from kq.router import Consumer


class RoundRobin:
    """The consumers of one queue, which compete for its messages and take turns.

    One that runs as many handlers as its ``concurrency`` allows is passed over. One thread's.

    Args:
        consumers: In the order of their declaration; at least one.
    """

    __slots__ = ("_after", "_most", "_next", "_running", "consumers")

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        self.consumers = tuple(consumers)
        self._most = [inf if consumer.concurrency is None else consumer.concurrency for consumer in consumers]
        self._after = [*range(1, len(consumers)), 0]
        self._running = [0] * len(consumers)
        self._next = 0

    @property
    def has_room(self) -> bool:
        """Whether any of them may run one more."""
        return any(running < most for running, most in zip(self._running, self._most, strict=True))

    def take(self) -> int | None:
        """Count a run for the next consumer that has room, and return its index; None if none has."""
        index = self._next
        while self._running[index] >= self._most[index]:
            index = self._after[index]
            if index == self._next:
                return None
        return self._start(index)

    def take_anyway(self) -> int:
        """Count a run for the next consumer that has room, or else for the next, and return its index."""
        index = self.take()
        return self._start(self._next) if index is None else index

    def leave(self, index: int) -> None:
        """Note that a run of a consumer has ended, or came back unstarted."""
        self._running[index] -= 1

    def _start(self, index: int) -> int:
        self._running[index] += 1
        self._next = self._after[index]
        return index
