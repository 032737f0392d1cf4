"""Runs whose messages have been lost meanwhile, to a broken connection, say, and may come back.

The handler goes on. A message that comes back as it was is settled by the run that it has already, or as that ended; it
is not run a second time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from time import monotonic
from typing import Final

from kq.backend import Delivery
from kq.outcome import Outcome
from kq.worker.flight import Flight

#: Ends of lost deliveries that are remembered, and seconds within which they come back: so long a broker may be away.
_ENDS: Final = 1000
_BACK_WITHIN: Final = 3600.0


class Adrift:
    """Knows, by queue and id, what has been lost while it ran, and how such runs have ended."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], Flight] = {}
        #: How runs ended that nobody could be told of, with what tells a delivery from others of its id and is small.
        self._ends: OrderedDict[tuple[str, str], tuple[tuple[int, int, int], Outcome, float]] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether anything runs that has been lost."""
        return bool(self._running)

    def lose(self, flights: Iterable[Flight]) -> None:
        """Note which of these are lost."""
        for flight in flights:
            if flight.lost:
                self._running[flight.delivery.queue, flight.delivery.id] = flight

    def find(self, delivery: Delivery) -> Flight | None:
        """Return the run that is to settle a delivery, which is that run's from now on; None for one that is new.

        Else the same message would run here twice at the same time.
        """
        key = (delivery.queue, delivery.id)
        flight = self._running.get(key)
        # One that its handler has settled ends as was said then. One that is otherwise ran elsewhere meanwhile, and
        # failed there; or it is another message under the same id.
        if flight is None or flight.settled or not _is_same(flight.delivery, delivery):
            return None
        del self._running[key]
        return flight

    def forget(self, flight: Flight) -> None:
        """Note that a run is over, or not ours any more."""
        self._running.pop((flight.delivery.queue, flight.delivery.id), None)

    def remember_end(self, delivery: Delivery, outcome: Outcome) -> None:
        """Remember how a run ended that can settle nothing: its message may be on its way back to us."""
        self._ends[delivery.queue, delivery.id] = (_marks(delivery), outcome, monotonic())
        while len(self._ends) > _ENDS:
            self._ends.popitem(last=False)

    def end_of(self, delivery: Delivery) -> Outcome | None:
        """Return how a delivery has ended that was lost while it ran here, and came back after that."""
        if not self._ends:
            return None
        was, outcome, at = self._ends.pop((delivery.queue, delivery.id), (None, None, 0.0))
        # Later it is another life: somebody has replayed it, or published it again, to have it run.
        return outcome if was == _marks(delivery) and monotonic() - at <= _BACK_WITHIN else None

    def forget_ends(self) -> None:
        """Have whatever comes back from now on run anew."""
        self._ends.clear()


def _marks(delivery: Delivery) -> tuple[int, int, int]:
    return hash(delivery.raw), delivery.attempts, delivery.crashes


def _is_same(was: Delivery, delivery: Delivery) -> bool:
    return (was.raw, was.attempts, was.crashes) == (delivery.raw, delivery.attempts, delivery.crashes)
