"""What a feed remembers of messages beyond its connection: those it has done, and those it has lost. Pure.

When a connection breaks RabbitMQ gives all that is unsettled out again, and counts it. Where the same worker gets it
back, it knows better: what it has done and whose acknowledgement got lost is not to run again, and that a
connection broke says nothing of the message. Nor does it that a worker gave back what it had no use for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, TypeVar

from kq.backend import Delivery

#: Messages of each kind that are remembered, the latest.
_MOST: Final = 5000

_K = TypeVar("_K", bound=Hashable)


class Recollection:
    """Remembers by queue and id."""

    def __init__(self) -> None:
        #: By what they were: another message may come under the same id.
        self._done: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._losses: OrderedDict[tuple[str, str], int] = OrderedDict()

    def done(self, delivery: Delivery) -> None:
        """Note that a message has been handled."""
        key = (delivery.queue, delivery.id)
        self._done.pop(key, None)
        self._done[key] = hash(delivery.raw)
        self._losses.pop(key, None)
        _cut(self._done)

    def not_done(self, delivery: Delivery) -> None:
        """Note that a message has not been handled, whatever was said before: its early acknowledgement failed."""
        self._done.pop((delivery.queue, delivery.id), None)

    def went_back(self, delivery: Delivery) -> None:
        """Note that a delivery was lost with its connection or given back: the broker counts it."""
        key = (delivery.queue, delivery.id)
        self._losses[key] = self._losses.pop(key, 0) + 1
        _cut(self._losses)

    def copied(self, delivery: Delivery) -> None:
        """Note that a copy has taken a message's place, of which the broker has counted nothing."""
        self._losses.pop((delivery.queue, delivery.id), None)

    def is_done(self, delivery: Delivery) -> bool:
        """Tell whether this very message has been handled here."""
        return self._done.get((delivery.queue, delivery.id)) == hash(delivery.raw)

    def losses(self, queue: str, id: str) -> int:
        """Return how often a message went back from here since it was last handled or copied."""
        return self._losses.get((queue, id), 0)


def _cut(kept: OrderedDict[_K, int]) -> None:
    while len(kept) > _MOST:
        kept.popitem(last=False)
