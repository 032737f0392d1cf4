"""Whether a subscription is what it seems. Pure: decides when to look into which queue, and what a look means.

A broker can forget a consumer without a word, and a consumer that is not subscribed looks like one of an empty queue.
So a quiet queue is looked into from time to time. If messages wait in it, and there is room for them here, and none
comes within a moment, the subscription is dead.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Final

#: Seconds between two looks at one queue, and between two looks at all of them together at least.
_EVERY: Final = 2.0
_LEAST: Final = 1.0
#: Seconds within which a message that waits should have come.
_PATIENCE: Final = 1.0

#: Tells whether there is room for a message of a queue.
HasRoom = Callable[[str], bool]


class Watch:
    """Watches the queues of one feed. Moments are of the monotonic clock.

    Args:
        queues: Which.
        now: The moment from which on.
    """

    def __init__(self, queues: Iterable[str], now: float) -> None:
        self._turns = deque(queues)
        self._next_at = now + _EVERY
        self._arrived: Counter[str] = Counter()
        #: What had arrived at the last look.
        self._before: dict[str, int] = {}
        #: A queue that should have sent something since a moment, and what had arrived by then.
        self._doubt: tuple[str, int, float] | None = None

    def arrived(self, queue: str) -> None:
        """Note that a message of a queue has come."""
        self._arrived[queue] += 1

    def forget(self) -> None:
        """Note that all subscriptions are new."""
        self._doubt = None

    def due(self, has_room: HasRoom, now: float) -> str | None:
        """Return a queue to look into: a quiet one, whose turn it is, with room for its messages."""
        if self._doubt is not None or now < self._next_at:
            return None
        self._next_at = now + max(_LEAST, _EVERY / len(self._turns))
        queue = self._turns[0]
        self._turns.rotate(-1)
        is_quiet = self._arrived[queue] == self._before.get(queue)
        self._before[queue] = self._arrived[queue]
        return queue if is_quiet and has_room(queue) else None

    def waits(self, queue: str, now: float) -> None:
        """Note that messages wait in a queue."""
        self._doubt = (queue, self._arrived[queue], now)

    def dead(self, has_room: HasRoom, now: float) -> str | None:
        """Return a queue that sends nothing although messages wait in it, or None; once for each doubt."""
        if self._doubt is None:
            return None
        queue, count, since = self._doubt
        if self._arrived[queue] != count or not has_room(queue):
            self._doubt = None
        elif now - since >= _PATIENCE:
            self._doubt = None
            return queue
        return None
