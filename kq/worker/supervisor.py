"""The loop that hands deliveries to handlers and settles what comes of them.

One thread. Deliveries come in from the fetchers, go to the pool's places as jobs, and end as outcomes,
which go back to them as settlements. A delivery that must run alone waits until a place is
empty; everything else goes to whoever has room.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kq import errors
from kq.backend import Delivery, QueueSpec, Settlement
from kq.executor import Job, timeout_outcome
from kq.intake import Intake
from kq.outcome import CRASH_LOOP, RELEASE, Failure, Outcome
from kq.retry import RetryPolicy, after_crash
from kq.router import Consumer
from kq.worker.pool import Died, Event, Finished, Place, Pool, Returned
from kq.worker.round_robin import RoundRobin

logger = logging.getLogger("kq.worker")

#: Unsettled deliveries in a row after which a message runs alone in its process.
_ALONE_AFTER = 2
#: Seconds to wait at the end for what is just being fetched.
_PAUSE_PATIENCE = 2.0
#: Bytes of messages that a worker holds at most, beyond what its handlers run.
_HOLD_BYTES = 64 * 2**20


@dataclass(eq=False)
class Flight:
    """A delivery in this worker's hands.

    Attributes:
        tag: Its number here.
        delivery: What arrived.
        suspected: Crashes in which it may have been the guilty one: several ran when a process died.
        settled: Whether it is settled already, while its handler still runs.
        consumer: Which of its queue's consumers it was given to last.
    """

    tag: int
    delivery: Delivery
    suspected: int = 0
    settled: bool = False
    consumer: int = 0

    @property
    def alone(self) -> bool:
        """Whether it runs with nothing beside it: it may take its process with it."""
        delivery = self.delivery
        return bool(self.suspected or delivery.crashes or delivery.deliveries >= _ALONE_AFTER)


@dataclass
class Tally:
    """What a supervisor has seen; for the summary at the end, and for tests."""

    handled: int = 0
    retried: int = 0
    dead: int = 0
    released: int = 0
    crashes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.handled} done, {self.retried} retried, {self.dead} dead-lettered, {self.released} released"


class Supervisor:
    """Moves deliveries from the fetchers through the pool and back.

    Args:
        pool: Where handlers run.
        consumers: The consumers of each queue, by its id.
        specs: The queues, by id.
        max_deliveries: Deliveries in a row that nobody settles before a message is dead-lettered.
        prefetch: Deliveries in hand at most.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        consumers: Mapping[str, Sequence[Consumer]],
        specs: Mapping[str, QueueSpec],
        max_deliveries: int,
        prefetch: int,
    ) -> None:
        self._pool = pool
        self._turns = {queue: RoundRobin(competing) for queue, competing in consumers.items()}
        #: Queues whose deliveries their fetcher acknowledges beforehand; the same for all consumers of one.
        self._auto_ack = {queue for queue, competing in consumers.items() if competing[0].auto_ack}
        self._specs = specs
        self._max_deliveries = max_deliveries
        self._prefetch = prefetch
        self._flights: dict[int, Flight] = {}
        self._backlog: deque[Flight] = deque()
        self._alone: deque[Flight] = deque()
        self._reserved: Place | None = None
        self._next_tag = 1
        self._arrivals: deque[list[Delivery]] = deque()
        self._size = 0.0
        self._stopping = False
        self._intake: Intake | None = None
        self.tally = Tally()

    def attach(self, intake: Intake) -> None:
        """Say where deliveries come from and settlements go."""
        self._intake = intake

    def arrived(self, deliveries: list[Delivery]) -> None:
        """Take deliveries; called in a fetcher's thread."""
        self._arrivals.append(deliveries)
        self._pool.wake()

    def timeout_of(self, tag: int) -> float | None:
        """Return the time limit of a job."""
        flight = self._flights.get(tag)
        return None if flight is None else self._consumer(flight).timeout

    @property
    def in_hand(self) -> int:
        """How many deliveries are with this worker, waiting or running."""
        return len(self._flights)

    def turn(self, timeout: float) -> None:
        """Do one round: wait for events, settle, take what arrived, hand out jobs."""
        self._handle(self._pool.poll(timeout))
        self._admit()
        if self._stopping:
            self._release_waiting()
        else:
            self._dispatch()
            self._ask()

    def stop_fetching(self) -> None:
        """Take nothing more, and give back what has not started."""
        assert self._intake is not None
        self._stopping = True
        self._intake.pause(_PAUSE_PATIENCE)
        self._admit()
        self._start_acknowledged()
        self._release_waiting()
        self._pool.recall()

    def take_last(self, events: list[Event]) -> None:
        """Take the results that came while the pool was closing; nobody is charged for being closed."""
        self._handle([event for event in events if isinstance(event, Finished)])

    def release_all(self) -> None:
        """Give back everything that is still here, uncharged. Call it once nothing runs any more."""
        self._admit()
        self._release_waiting()
        for flight in list(self._flights.values()):
            self._settle(flight, RELEASE)

    # Events.

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Finished):
                self._finish(event)
            elif isinstance(event, Returned):
                for tag in event.tags:
                    self._give_back(tag)
            else:
                self._examine(event)

    def _finish(self, event: Finished) -> None:
        settlements = []
        freed: Counter[str] = Counter()
        for tag, result in event.results:
            flight = self._flights.get(tag)
            if flight is None:
                continue
            # A handler that settled its message was heard before; were it not, the message runs again.
            outcome = RELEASE if result is None and not flight.settled and not event.early else result
            if outcome is not None and not flight.settled:
                self._note(flight, outcome)
                settlements.append(Settlement(flight.delivery, outcome))
                flight.settled = True
            if not event.early:
                del self._flights[tag]
                queue = flight.delivery.queue
                self._turns[queue].leave(flight.consumer)
                freed[queue] += 1
        assert self._intake is not None
        if settlements:
            self._intake.settle(settlements)
        for queue, count in freed.items():
            self._intake.finished(queue, count)
        if self._reserved is event.place and not event.place.tags:
            self._free_reserved()

    def _give_back(self, tag: int) -> None:
        flight = self._flights.get(tag)
        if flight is not None:
            self._turns[flight.delivery.queue].leave(flight.consumer)
            self._put_back(flight)

    def _examine(self, death: Died) -> None:
        """Find out whom to charge for a process that died, and give the others their chance again."""
        if self._reserved is death.place:
            self._reserved = None
        for tag in (*death.running, *death.queued):
            flight = self._flights.get(tag)
            if flight is not None:
                self._turns[flight.delivery.queue].leave(flight.consumer)
        running = [self._flights[tag] for tag in death.running if tag in self._flights]
        for tag in reversed(death.queued):
            if tag in self._flights:
                self._put_back(self._flights[tag])
        if death.late:
            for flight in running:
                if flight.settled:
                    self._drop(flight)
                elif flight.tag == death.late:
                    self._charge_late(flight)
                else:
                    self._put_back(flight)
            return
        self.tally.crashes += 1
        suspects = [flight for flight in running if not flight.settled]
        for flight in running:
            if flight.settled:
                self._drop(flight)
        if len(suspects) == 1:
            self._charge_crash(suspects[0], death.how)
            return
        for flight in suspects:
            # Each runs alone next; only the one that crashes again is charged, for both times.
            flight.suspected += 1
            self._put_back(flight)
        if suspects:
            logger.warning(
                "%d messages ran when the process died: %s; each runs alone now, to find the one that does it",
                len(suspects),
                ", ".join(flight.delivery.id for flight in suspects),
                extra={"action": "suspects"},
            )

    def _charge_late(self, flight: Flight) -> None:
        consumer, policy = self._rules(flight)
        delivery = flight.delivery
        outcome = timeout_outcome(consumer, policy, attempts=delivery.attempts, crashes=delivery.crashes)
        self._settle(flight, outcome)

    def _charge_crash(self, flight: Flight, how: str) -> None:
        _, policy = self._rules(flight)
        delivery = flight.delivery
        crashes = delivery.crashes + flight.suspected + 1
        attempts = delivery.attempts + flight.suspected + 1
        failure = Failure(errors.INTERNAL, f"the process that ran the handler {how}", True)
        self._settle(flight, after_crash(failure, policy, attempts=attempts, crashes=crashes))

    def _consumer(self, flight: Flight) -> Consumer:
        return self._turns[flight.delivery.queue].consumers[flight.consumer]

    def _rules(self, flight: Flight) -> tuple[Consumer, RetryPolicy]:
        consumer = self._consumer(flight)
        return consumer, consumer.policy(self._specs[consumer.queue].policy)

    # Arrivals and jobs.

    def _admit(self) -> None:
        while self._arrivals:
            for delivery in self._arrivals.popleft():
                flight = Flight(self._next_tag, delivery)
                self._next_tag += 1
                self._flights[flight.tag] = flight
                self._size += (len(delivery.raw) - self._size) / 64
                if delivery.refused is not None:
                    self._settle(flight, delivery.refused)
                    continue
                auto_ack = delivery.queue in self._auto_ack
                if delivery.deliveries >= self._max_deliveries and not auto_ack:
                    self._settle(flight, self._given_up(delivery))
                    continue
                if auto_ack:
                    # The fetcher has acknowledged it already.
                    flight.settled = True
                    self.tally.handled += 1
                self._put_back(flight, front=False)

    def _given_up(self, delivery: Delivery) -> Outcome:
        text = f"{delivery.deliveries} workers in a row died or vanished while they held this message"
        failure = Failure(errors.INTERNAL, text, False)
        return Outcome("dead", 0.0, delivery.attempts, delivery.crashes, CRASH_LOOP, failure)

    def _put_back(self, flight: Flight, *, front: bool = True) -> None:
        line = self._alone if flight.alone else self._backlog
        if front:
            line.appendleft(flight)
        else:
            line.append(flight)

    def _dispatch(self) -> None:
        self._dispatch_alone()
        if not self._backlog:
            return
        places = [place for place in self._pool.places if place is not self._reserved and place.room]
        shares: dict[Place, list[Job]] = {place: [] for place in places}
        passed: list[Flight] = []
        while self._backlog and places:
            flight = self._backlog.popleft()
            consumer = self._turns[flight.delivery.queue].take()
            if consumer is None:
                passed.append(flight)
                continue
            # The emptiest first, so that no process idles while another one hoards.
            place = min(places, key=lambda p: len(p.tags) + len(shares[p]))
            shares[place].append(self._job(flight, consumer))
            if len(place.tags) + len(shares[place]) >= place.window:
                places.remove(place)
        self._backlog.extendleft(reversed(passed))
        for place, jobs in shares.items():
            if jobs:
                self._pool.submit(place, jobs)

    def _dispatch_alone(self) -> None:
        if not self._alone:
            return
        if self._reserved is not None and not self._reserved.accepting:
            self._reserved = None
        if self._reserved is None:
            ready = [place for place in self._pool.places if place.ready and place.accepting]
            self._reserved = min(ready, key=lambda place: len(place.tags), default=None)
        place = self._reserved
        if place is None or not place.ready or place.tags:
            return
        for flight in self._alone:
            consumer = self._turns[flight.delivery.queue].take()
            if consumer is not None:
                self._alone.remove(flight)
                self._pool.submit(place, [self._job(flight, consumer)])
                return
        # Their consumers run as many as they may; nobody need wait for them.
        self._reserved = None

    def _free_reserved(self) -> None:
        if not self._alone:
            self._reserved = None

    @staticmethod
    def _job(flight: Flight, consumer: int) -> Job:
        delivery = flight.delivery
        flight.consumer = consumer
        return Job(
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

    def _ask(self) -> None:
        """Tell the fetchers how much to hold: what the places take, bounded by count and by bytes."""
        assert self._intake is not None
        wanted = sum(place.window for place in self._pool.places if place.ready and place.accepting)
        if self._size:
            wanted = min(wanted, max(len(self._pool.places), int(_HOLD_BYTES / self._size)))
        self._intake.hold(min(wanted, self._prefetch))

    # Ends.

    def _start_acknowledged(self) -> None:
        """Hand out what was acknowledged beforehand: it runs here or never."""
        places = [place for place in self._pool.places if place.ready]
        settled = [flight for flight in self._backlog if flight.settled]
        for number, flight in enumerate(settled if places else []):
            self._backlog.remove(flight)
            consumer = self._turns[flight.delivery.queue].take_anyway()
            self._pool.submit(places[number % len(places)], [self._job(flight, consumer)])

    def _release_waiting(self) -> None:
        waiting = [*self._backlog, *self._alone]
        self._backlog.clear()
        self._alone.clear()
        for flight in waiting:
            self._settle(flight, RELEASE)

    def _settle(self, flight: Flight, outcome: Outcome) -> None:
        assert self._intake is not None
        if not flight.settled:
            self._note(flight, outcome)
            self._intake.settle([Settlement(flight.delivery, outcome)])
        self._drop(flight)

    def _drop(self, flight: Flight) -> None:
        assert self._intake is not None
        if self._flights.pop(flight.tag, None) is not None:
            self._intake.finished(flight.delivery.queue)

    def _note(self, flight: Flight, outcome: Outcome) -> None:
        """Count an outcome, and log one that a person may want to know of."""
        if outcome.action == "done":
            self.tally.handled += 1
            return
        delivery = flight.delivery
        failure = outcome.failure
        what = failure.message if failure is not None else ""
        facts = {"queue": delivery.queue, "message_id": delivery.id, "attempts": outcome.attempts}
        if outcome.action == "retry":
            self.tally.retried += 1
            logger.warning(
                "%s %s failed (attempt %d), again in %.1f s: %s",
                delivery.queue, delivery.id, outcome.attempts, outcome.delay, what,
                extra={"action": "retry", **facts},
            )  # fmt: skip
        elif outcome.action == "dead":
            self.tally.dead += 1
            self.tally.reasons[outcome.reason] += 1
            logger.error(
                "%s %s dead-lettered, %s: %s",
                delivery.queue, delivery.id, outcome.reason, what,
                extra={"action": "dead", "reason": outcome.reason, **facts},
            )  # fmt: skip
            if failure is not None and failure.traceback:
                logger.debug("%s", failure.traceback, extra={"action": "traceback", **facts})
        else:
            self.tally.released += 1
