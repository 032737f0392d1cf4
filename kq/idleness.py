"""Whether several fetchers have run dry together.

A fetcher that has nothing in hand looks into its queues. But a look is worth only as much as it is
young: a handler of one broker's queue may publish to another's, where somebody looked before. So
deliveries that come and go are counted, and only looks that began after the last of them count.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Protocol


class Looker(Protocol):
    """A fetcher, as far as this is concerned."""

    def look(self) -> None:
        """Look into the queues once more, soon, and in another thread if need be."""
        ...


class Idleness:
    """Calls ``on_idle`` when nobody has anything left to do. Thread-safe.

    Args:
        on_idle: Called in the thread of whoever looked last.
    """

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self._lock = Lock()
        self._changes = 0
        #: By looker, how many changes there had been when its last look began that found nothing.
        self._looks: dict[Looker, int | None] = {}

    def add(self, looker: Looker) -> None:
        """Wait for this one too. Add all before the first of them looks."""
        with self._lock:
            self._looks[looker] = None

    def changed(self) -> None:
        """Say that deliveries came, or that handlers are done; before the latter leave room for others."""
        with self._lock:
            self._changes += 1

    def begin(self, looker: Looker) -> int:
        """Say that a look begins, and return what `found_nothing` wants to know about it."""
        with self._lock:
            self._looks[looker] = None
            return self._changes

    def found_nothing(self, looker: Looker, began: int) -> None:
        """Say that a look found nothing; have those look again whose last look is too old to count."""
        with self._lock:
            self._looks[looker] = began
            again = [other for other, look in self._looks.items() if look != self._changes]
        if not again:
            self._on_idle()
        for other in again:
            other.look()
