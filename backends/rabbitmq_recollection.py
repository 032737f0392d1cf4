"""What a feed remembers of messages beyond its connection: those it has done, and those it has lost. Pure.

When a connection breaks RabbitMQ gives all that is unsettled out again, and counts it. Where the same worker gets it
back, it knows better: what it has done and whose acknowledgement got lost is not to run again, and that a
connection broke says nothing of the message. Nor does it that a worker gave back what it had no use for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, TypeVar
from uuid import uuid4

from kq.backend import Delivery
from kq.backends.rabbitmq_topology import id_of
from kq.envelope import Envelope

#: Messages of each kind that are remembered, the latest.
_MOST: Final = 5000

#: Seconds for which the broker may not have read an acknowledgement: the system gives a connection up long before.
_UNKNOWN: Final = 120.0
#: Seconds of a new connection after which what was done does not come back any more: by then the broker has known of
#: the old one's end for long, and what comes under its id is another message.
_BACK_BY: Final = 600.0

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class Recollection:
    """Remembers by queue and id."""

    def __init__(self) -> None:
        #: With what they were, for another message may come under the same id; the connection over which they came,
        #: by number; and when they were done.
        self._done: OrderedDict[tuple[str, str], tuple[int, int, float]] = OrderedDict()
        self._losses: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._has_broken = False
        #: When the present connection was made.
        self._connected_at = 0.0

    def __bool__(self) -> bool:
        """Whether a new message may have to be told from one that was here: a connection broke, or some went back."""
        return self._has_broken or bool(self._losses)

    def done(self, delivery: Delivery, connection: int, now: float) -> None:
        """Note that a message has been handled.

        One that a copy has taken the place of is not: replayed from the dead letters it may come once more as it was.

        Args:
            delivery: Which.
            connection: The number of that over which it came.
            now: The moment, of the monotonic clock.
        """
        key = (delivery.queue, delivery.id)
        self._done.pop(key, None)
        self._done[key] = hash(delivery.raw), connection, now
        self._losses.pop(key, None)
        _cut(self._done)

    def not_done(self, delivery: Delivery) -> None:
        """Note that a message has not been handled, whatever was said of one that is like it."""
        self._done.pop((delivery.queue, delivery.id), None)

    def is_another(self, queue: str, id: str) -> None:
        """Note that a message has come that was never delivered before: not the one that was here under its id."""
        self._done.pop((queue, id), None)
        self._losses.pop((queue, id), None)

    def broke(self, now: float) -> None:
        """Note that the connection broke: what was acknowledged long before that, the broker knows."""
        self._has_broken = True
        while self._done and next(iter(self._done.values()))[2] < now - _UNKNOWN:
            self._done.popitem(last=False)

    def connected(self, now: float) -> None:
        """Note that there is a connection."""
        self._connected_at = now

    def went_back(self, queue: str, id: str) -> None:
        """Note that a delivery was lost with its connection or given back: the broker counts it."""
        key = (queue, id)
        self._losses[key] = self._losses.pop(key, 0) + 1
        _cut(self._losses)

    def copied(self, delivery: Delivery) -> None:
        """Note that a copy has taken a message's place, of which the broker has counted nothing."""
        self._losses.pop((delivery.queue, delivery.id), None)

    def is_done(self, delivery: Delivery, connection: int, now: float) -> bool:
        """Tell whether a message that has come again has been handled here, over a connection that broke since then.

        Over the same one no acknowledgement gets lost: it is another message, which somebody else has given back.
        """
        what, before, at = self._done.get((delivery.queue, delivery.id), (0, connection, 0.0))
        return before < connection and what == hash(delivery.raw) and now - max(at, self._connected_at) < _BACK_BY

    def losses(self, queue: str, id: str) -> int:
        """Return how often a message went back from here since it was last handled or copied."""
        return self._losses.get((queue, id), 0)


class Named:
    """The ids that were given to messages without one, by which those are known that come back while they run."""

    def __init__(self) -> None:
        #: By queue and content; of several that are alike any may be any other.
        self._lost: dict[tuple[str, str], list[str]] = {}
        #: Where each of these ids is.
        self._keys: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def remember(self, queue: str, envelope: Envelope) -> None:
        """Note that a delivery was lost with its connection."""
        key = (queue, id_of(envelope.headers, envelope.properties, envelope.body))
        self._lost.setdefault(key, []).append(envelope.id)
        self._keys[envelope.id] = key
        while len(self._keys) > _MOST:
            self.forget(next(iter(self._keys)))

    def forget(self, id: str) -> None:
        """Note that what had an id has been settled, though it may have run elsewhere: another one is not to get it."""
        key = self._keys.pop(id, None)
        if key is not None:
            ids = self._lost[key]
            ids.remove(id)
            if not ids:
                del self._lost[key]

    def again(self, queue: str, envelope: Envelope, body: bytes) -> str:
        """Return the id of a message that comes again: the one that it was given here, or a new one."""
        if self._lost:
            ids = self._lost.get((queue, id_of(envelope.headers, envelope.properties, body)))
            if ids:
                id = ids[0]
                self.forget(id)
                return id
        return uuid4().hex


def _cut(kept: OrderedDict[_K, _V]) -> None:
    while len(kept) > _MOST:
        kept.popitem(last=False)
