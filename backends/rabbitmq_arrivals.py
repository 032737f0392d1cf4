"""What has arrived from RabbitMQ and is not handed over yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from kq.backend import Delivery

#: Deliveries up to which each queue has its turn.
_FEW: Final = 256


class Arrivals:
    """Deliveries of several queues, in the order in which they are handed over.

    Few are handed over so that each queue has its turn: handlers may be slow, and a queue with a single message should
    not wait for another one's many. Many, which only fast handlers have, are handed over in the order of their tags.
    Then they are acknowledged in about that order as well, and RabbitMQ, which searches for each from the oldest
    unacknowledged one on, finds it near the front; else a hundred queues cost it six times as much as one.

    Args:
        queues: Whose deliveries.
    """

    def __init__(self, queues: Iterable[str]) -> None:
        #: By queue, who had its turn last at the end.
        self._waiting: dict[str, deque[tuple[int, Delivery]]] = {queue: deque() for queue in queues}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Delivery]:
        """Give all, queue by queue."""
        return (delivery for waiting in self._waiting.values() for _, delivery in waiting)

    def count(self, queue: str) -> int:
        """Return how many there are of a queue."""
        return len(self._waiting[queue])

    def ready(self, credit: int, caps: Mapping[str, int]) -> int:
        """Return how many `take` would return."""
        return min(credit, sum(min(len(waiting), caps.get(queue, credit)) for queue, waiting in self._waiting.items()))

    def add(self, tag: int, delivery: Delivery) -> None:
        """Add one that has arrived after all others."""
        self._waiting[delivery.queue].append((tag, delivery))
        self._count += 1

    def take(self, credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        """Remove and return the next ones.

        Args:
            credit: How many at most.
            caps: How many at most of a queue, for those that have such a limit.
        """
        room = {
            queue: most for queue, waiting in self._waiting.items() if waiting and (most := caps.get(queue, credit)) > 0
        }
        in_turn = len(room) > 1 and self._count <= _FEW
        taken = self._take_in_turn(credit, room) if in_turn else self._take_in_order(credit, room)
        self._count -= len(taken)
        return taken

    def _take_in_turn(self, credit: int, room: dict[str, int]) -> list[Delivery]:
        taken: list[Delivery] = []
        turns = deque(room)
        while turns and len(taken) < credit:
            queue = turns.popleft()
            waiting = self._waiting[queue] = self._waiting.pop(queue)
            taken.append(waiting.popleft()[1])
            room[queue] -= 1
            if waiting and room[queue]:
                turns.append(queue)
        return taken

    def _take_in_order(self, credit: int, room: dict[str, int]) -> list[Delivery]:
        taken: list[Delivery] = []
        first = [(self._waiting[queue][0][0], queue) for queue in room]
        heapify(first)
        while first and len(taken) < credit:
            _, queue = heappop(first)
            waiting = self._waiting[queue]
            others = first[0][0] if first else inf
            before = len(taken)
            most = min(credit, before + room[queue])
            while waiting and waiting[0][0] < others and len(taken) < most:
                taken.append(waiting.popleft()[1])
            room[queue] -= len(taken) - before
            if waiting and room[queue]:
                heappush(first, (waiting[0][0], queue))
        return taken

    def remove(self, which: Callable[[Delivery], bool]) -> list[Delivery]:
        """Remove and return those of a kind, queue by queue."""
        removed = [delivery for delivery in self if which(delivery)]
        for queue, waiting in self._waiting.items():
            self._waiting[queue] = deque(entry for entry in waiting if not which(entry[1]))
        self._count -= len(removed)
        return removed

    def clear(self) -> None:
        """Remove all."""
        for waiting in self._waiting.values():
            waiting.clear()
        self._count = 0
