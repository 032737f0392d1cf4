"""When messages are due that this process has had RabbitMQ hold back: its clients cannot see them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from heapq import heappop, heappush, nsmallest
from threading import RLock
from time import monotonic
from typing import Final

#: Messages of one queue that are remembered: of more, those that are due first.
_MOST: Final = 100_000
#: Queues that are remembered: of more, those that nothing is due on are forgotten.
_QUEUES: Final = 10_000
#: Seconds by which RabbitMQ may be late.
_LATE: Final = 1.0


class Due:
    """Remembers by broker and queue. Thread-safe."""

    def __init__(self) -> None:
        # A signal's handler may publish in the middle of it.
        self._lock = RLock()
        self._times: dict[tuple[str, str], list[float]] = {}
        #: How many queues there may be until then.
        self._forget_at = _QUEUES

    def note(self, url: str, queue: str, delay: float) -> None:
        """Note that a message will be on its queue in so many seconds."""
        now = monotonic()
        with self._lock:
            if len(self._times) >= self._forget_at:
                kept = [(key, t) for key, t in list(self._times.items()) if max(t, default=0.0) >= now - _LATE]
                self._times = dict(kept)
                self._forget_at = max(_QUEUES, 2 * len(self._times))
            times = self._times.setdefault((url, queue), [])
            heappush(times, now + delay)
            while times[0] < now - _LATE:
                heappop(times)
            if len(times) > _MOST:
                times[:] = nsmallest(_MOST // 2, times)

    def soonest(self, url: str, queues: Iterable[str]) -> float | None:
        """Return the seconds until the first one on some queues; negative where RabbitMQ is late, None for none."""
        now = monotonic()
        found: list[float] = []
        with self._lock:
            for queue in queues:
                times = self._times.get((url, queue), [])
                while times and times[0] < now - _LATE:
                    heappop(times)
                found += times[:1]
        return min(found) - now if found else None


#: Of this process: whoever publishes and whoever consumes have connections of their own.
due = Due()
if hasattr(os, "register_at_fork"):
    # A fork has sent nothing yet, and whoever held the lock is not in it.
    os.register_at_fork(after_in_child=due.__init__)  # type: ignore[misc]
