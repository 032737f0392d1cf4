"""Decides which delivery runs where, when, and in whose company.

There are three lines. The *backlog* goes to whoever has room. What may take its process with it waits for a
place that runs nothing else: it is *alone*. And what many workers in a row did not live to settle waits in
*quarantine* until this worker holds nothing else at all, for whatever it holds when it dies counts one more lost
delivery as well, and would be dead in the end without ever having done any harm.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from kq.executor import Job
from kq.worker.flight import Flight
from kq.worker.pool import Place, Pool
from kq.worker.round_robin import RoundRobin

logger = logging.getLogger("kq.worker")


class Hands(Protocol):
    """Who holds the deliveries."""

    @property
    def in_hand(self) -> int:
        """How many there are, waiting or running."""
        ...

    def release(self, flight: Flight) -> None:
        """Give one back, uncharged, with what is on its account."""
        ...

    def drop(self, flight: Flight) -> None:
        """Forget one."""
        ...

    def when_settled(self, queue: str, call: Callable[[], None]) -> None:
        """Have ``call`` called in some thread when the brokers know of all that was settled so far.

        Of those that are away only the one that has ``queue`` is waited for.
        """
        ...


class Dispatcher:
    """Gives jobs to places. Under the pool's lock.

    Args:
        pool: Where handlers run.
        turns: By queue, whose turn it is among its consumers.
        hands: Who holds the deliveries.
        isolate_from: Unsettled deliveries in a row from which on a message runs with nothing else in hand.
    """

    def __init__(self, pool: Pool, turns: Mapping[str, RoundRobin], hands: Hands, *, isolate_from: int) -> None:
        self._pool = pool
        self._turns = turns
        self._hands = hands
        self._isolate_from = isolate_from
        self._backlog: deque[Flight] = deque()
        self._alone: deque[Flight] = deque()
        self._quarantine: deque[Flight] = deque()
        #: Places that run one that is alone; and the one that is kept free for the next.
        self._taken: set[Place] = set()
        self._reserved: Place | None = None
        self._isolated: Flight | None = None
        #: Counted up whenever hands were not empty; for which count it was asked, and said, that the broker knows.
        self._clearance = 1
        self._clearance_asked = self._clearance_given = 0
        #: How many of those that wait do so because their consumers run as many as they may.
        self.held_back = 0

    @property
    def isolating(self) -> bool:
        """Whether nothing else is to be taken in hand now."""
        return self._isolated is not None or bool(self._quarantine)

    def put(self, flight: Flight, *, front: bool) -> None:
        """Have a delivery wait, before or behind the others of its line."""
        if flight.delivery.deliveries >= self._isolate_from and not flight.settled:
            line = self._quarantine
            if not self._quarantine and self._hands.in_hand > 1:
                logger.warning(
                    "%s %s: %d workers in a row have not lived to settle it; nothing is fetched until all else that "
                    "runs here has ended, and then it runs with nothing beside it",
                    flight.delivery.queue, flight.delivery.id, flight.delivery.deliveries,
                    extra={"action": "quarantined", "queue": flight.delivery.queue, "message_id": flight.delivery.id},
                )  # fmt: skip
        else:
            line = self._alone if flight.alone else self._backlog
        if front:
            line.appendleft(flight)
        else:
            line.append(flight)

    def take_all(self) -> list[Flight]:
        """Return everything that waits, and forget it."""
        waiting = [*self._quarantine, *self._backlog, *self._alone]
        for line in (self._quarantine, self._backlog, self._alone):
            line.clear()
        if waiting:
            self._clearance += 1
        return waiting

    def take_last(self, count: int) -> list[Flight]:
        """Return so many, at most, of those that would run last and that others may run, and forget them."""
        taken = [flight for flight in reversed(self._backlog) if not self._is_bound(flight)][:count]
        if taken:
            chosen = {flight.tag for flight in taken}
            kept = [flight for flight in self._backlog if flight.tag not in chosen]
            self._backlog.clear()
            self._backlog.extend(kept)
            self._clearance += 1
        return taken[::-1]

    @property
    def bound(self) -> int:
        """How many of those that wait are to wait here: also where a place has room, they are not everybody's."""
        return len(self._alone) + sum(map(self._is_bound, self._backlog))

    def _is_bound(self, flight: Flight) -> bool:
        """Tell whether one of the backlog was acknowledged beforehand, or its consumers run as many as they may."""
        return flight.settled or not self._turns[flight.delivery.queue].has_room

    def drop_lost(self) -> None:
        """Drop what waits and is not ours any more: it runs elsewhere."""
        for line in (self._quarantine, self._backlog, self._alone):
            lost = [flight for flight in line if flight.lost]
            if lost:
                kept = [flight for flight in line if not flight.lost]
                line.clear()
                line.extend(kept)
                self._clearance += 1
                for flight in lost:
                    self._hands.drop(flight)

    def ended(self, flight: Flight) -> None:
        """Note that a run has ended, or came back unstarted."""
        self._turns[flight.delivery.queue].leave(flight.consumer)
        if flight is self._isolated:
            self._isolated = None

    def dispatch(self) -> None:
        """Hand out what can run now."""
        if self._taken:
            self._taken = {place for place in self._taken if place.tags and place in self._pool.places}
        if self.isolating:
            self._empty_hands()
            if self._isolated is None:
                self._isolate(self._quarantine[0])
            return
        self._reserved = self._dispatch_alone()
        self._dispatch_backlog()

    def takes_company(self, place: Place) -> bool:
        """Tell whether a place may be given more, beside what it runs."""
        return place.ready and place.accepting and place is not self._reserved and place not in self._taken

    def start_anyway(self) -> bool:
        """Hand out what was acknowledged beforehand: it runs here or never.

        Returns:
            Whether there is something for which there is no place now.
        """
        places = [place for place in self._pool.places if place.ready and place.accepting]
        lines = (self._backlog, self._alone)
        settled = [(line, flight) for line in lines for flight in line if flight.settled]
        for number, (line, flight) in enumerate(settled if places else []):
            line.remove(flight)
            consumer = self._turns[flight.delivery.queue].take_anyway()
            self._submit(places[number % len(places)], [(flight, consumer)])
        return bool(settled) and not places

    # Company.

    def _dispatch_backlog(self) -> None:
        self.held_back = 0
        if not self._backlog:
            return
        places = [place for place in self._pool.places if place.room and self.takes_company(place)]
        shares: dict[Place, list[tuple[Flight, int]]] = {place: [] for place in places}
        passed: list[Flight] = []
        while self._backlog and places:
            flight = self._backlog.popleft()
            consumer = self._turns[flight.delivery.queue].take()
            if consumer is None:
                passed.append(flight)
                continue
            # The emptiest first, so that no process idles while another one hoards.
            place = min(places, key=lambda p: len(p.tags) + len(shares[p]))
            shares[place].append((flight, consumer))
            if len(place.tags) + len(shares[place]) >= place.window:
                places.remove(place)
        self.held_back = len(passed)
        self._backlog.extendleft(reversed(passed))
        for place, share in shares.items():
            if share:
                self._submit(place, share)

    def _dispatch_alone(self) -> Place | None:
        """Give every empty place one that must be alone, and return the place to be kept free for the next."""
        if not self._alone:
            return None
        empty = [place for place in self._pool.places if place.room and not place.tags]
        waiting = None
        for flight in list(self._alone):
            if not empty:
                waiting = next((f for f in self._alone if self._turns[f.delivery.queue].has_room), None)
                break
            consumer = self._turns[flight.delivery.queue].take()
            if consumer is None:
                # Its consumers run as many as they may; nobody need wait for it.
                continue
            self._alone.remove(flight)
            place = empty.pop()
            self._taken.add(place)
            self._submit(place, [(flight, consumer)])
        if waiting is None:
            return None
        # The one that will be empty first, as far as one can tell; another one each time if that turns out wrong.
        busy = [p for p in self._pool.places if p.ready and p.accepting and p not in self._taken]
        return min(busy, key=lambda place: len(place.tags), default=None)

    def _submit(self, place: Place, share: list[tuple[Flight, int]]) -> None:
        jobs = []
        for flight, consumer in share:
            flight.consumer = consumer
            delivery = flight.delivery
            jobs.append(
                Job(
                    flight.tag,
                    delivery.queue,
                    delivery.id,
                    delivery.raw,
                    delivery.attempts,
                    delivery.crashes,
                    flight.settled,
                    consumer,
                    delivery.replayed,
                )
            )
        self._pool.submit(place, jobs)

    # Isolation.

    def _empty_hands(self) -> None:
        """Give back what waits, but for the one that is to run with nothing else in hand."""
        first = [] if self._isolated is not None else [self._quarantine.popleft()]
        waiting = self.take_all()
        self._quarantine.extend(first)
        if self._hands.in_hand > 1:
            self._clearance += 1
        for flight in waiting:
            if flight.settled:
                # Acknowledged beforehand: it runs here or never.
                self._backlog.append(flight)
            else:
                self._hands.release(flight)
        if self._isolated is None:
            self._reserved = None
            self._dispatch_backlog()

    def _isolate(self, flight: Flight) -> None:
        """Run a message once all else that was in hand is done, and the broker knows it."""
        # In this order: what was fetched before the answer came is in hand by then.
        is_clear = self._clearance_given == self._clearance
        if self._hands.in_hand > 1:
            return
        if not is_clear:
            if self._clearance_asked != self._clearance:
                self._clearance_asked = self._clearance
                self._hands.when_settled(flight.delivery.queue, partial(self._clear, self._clearance))
            return
        place = next((place for place in self._pool.places if place.room and not place.tags), None)
        consumer = None if place is None else self._turns[flight.delivery.queue].take()
        if place is None or consumer is None:
            return
        delivery = flight.delivery
        logger.warning(
            "%s %s: %d workers in a row have not lived to settle it; it runs with nothing else in this worker",
            delivery.queue, delivery.id, delivery.deliveries,
            extra={"action": "isolated", "queue": delivery.queue, "message_id": delivery.id},
        )  # fmt: skip
        self._quarantine.popleft()
        self._isolated = flight
        self._clearance += 1
        self._submit(place, [(flight, consumer)])

    def _clear(self, clearance: int) -> None:
        """Note that the broker knows; called in a fetcher's thread."""
        self._clearance_given = clearance
        self._pool.wake()
