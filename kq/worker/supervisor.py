"""The loop that hands deliveries to handlers and settles what comes of them.

Deliveries come in from the fetchers, go to the pool's places as jobs, and end as outcomes, which go back to them as
settlements. The `Dispatcher` decides what runs where and beside what. The worker's own thread does all of it, but for
a few deliveries that find it waiting: those their fetcher hands out. Whoever does anything holds the pool's lock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from kq.backend import Delivery, QueueSpec, Settlement
from kq.failure_log import logger
from kq.intake import Intake
from kq.outcome import RELEASE, UNDECODABLE, Outcome, given_up, refused
from kq.retry import RetryPolicy
from kq.router import Consumer
from kq.worker.adrift import Adrift
from kq.worker.dispatcher import Dispatcher
from kq.worker.flight import Flight, Tally
from kq.worker.hoard import HOARDS_AFTER, Hoard
from kq.worker.inquest import examine
from kq.worker.pool import Died, Event, Finished, Pool, Returned
from kq.worker.round_robin import RoundRobin

#: Seconds to wait at the end for what is just being fetched.
_PAUSE_PATIENCE = 2.0
#: Seconds over which the handlers' pace is measured, and for how many of the broker's round trips it is to last.
_PACE_OVER = 0.5
_AHEAD = 2.0
#: Deliveries that are handed out in the thread that brought them. More of them find this worker busy anyway, and their
#: fetcher is better off with fetching.
_AT_ONCE = 8
#: Bytes of messages that a worker holds at most, beyond what its handlers run.
_HOLD_BYTES = 64 * 2**20
#: Of ``max_deliveries`` at least, where a worker gives back what waits for slow handlers.
_GIVES_BACK: Final = 4
#: What of ``max_deliveries`` a message may use up in company; from then on its worker holds nothing else.
_IN_COMPANY = 0.5
#: Bytes that a message may have beyond those of the largest body, for its headers, to be given to a process at all.
_HEADERS: Final = 2**20


class Supervisor:
    """Moves deliveries from the fetchers through the pool and back.

    Args:
        pool: Where handlers run.
        consumers: The consumers of each queue, by its id.
        specs: The queues, by id.
        max_deliveries: Deliveries in a row that nobody settles before a message is dead-lettered.
        max_body: Bytes of the largest body; whatever is much larger is dead-lettered unseen.
        prefetch: Deliveries in hand at most.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        consumers: Mapping[str, Sequence[Consumer]],
        specs: Mapping[str, QueueSpec],
        max_deliveries: int,
        max_body: int,
        prefetch: int,
    ) -> None:
        self._pool = pool
        self._turns = {queue: RoundRobin(competing) for queue, competing in consumers.items()}
        #: Queues whose deliveries their fetcher acknowledges beforehand; the same for all consumers of one.
        self._auto_ack = {queue for queue, competing in consumers.items() if competing[0].auto_ack}
        self._specs = specs
        self._max_deliveries = max_deliveries
        self._max_body = max_body
        self._prefetch = prefetch
        self._flights: dict[int, Flight] = {}
        self._dispatcher = Dispatcher(pool, self._turns, self, isolate_from=max(1, int(max_deliveries * _IN_COMPANY)))
        self._adrift = Adrift()
        self._has_lost = False
        self._next_tag = 1
        self._arrivals: deque[list[Delivery]] = deque()
        #: Bytes of what is in hand, and of a message on average.
        self._bytes = 0
        #: Handlers' ends since a moment, and how many a second there were before it.
        self._ended = 0
        self._paced_at = monotonic()
        self._per_second = 0.0
        self._size = 0.0
        self._hoard = Hoard()
        self._stopping = False
        #: Whether the pool starts nothing more.
        self._is_recalled = False
        #: What went wrong in a fetcher's thread.
        self._failure: Exception | None = None
        self._intake: Intake | None = None
        self.tally = Tally()

    def attach(self, intake: Intake) -> None:
        """Say where deliveries come from and settlements go."""
        self._intake = intake

    def arrived(self, deliveries: list[Delivery]) -> None:
        """Take deliveries; called in a fetcher's thread.

        A few are handed out at once where this worker is waiting: its own thread would have to wake up first.
        """
        self._arrivals.append(deliveries)
        if not (len(deliveries) <= _AT_ONCE and self._hand_out()):
            self._pool.wake()

    def _hand_out(self) -> bool:
        """Take what arrived and hand it out, in the thread of a fetcher; False where that must be left to our own."""
        if not self._pool.lock.acquire(blocking=False):
            return False
        try:
            if self._stopping or self._pool.is_stuck:
                return False
            self._admit()
            self._dispatcher.dispatch()
            # Where nothing else may be in hand, something may have to be done in time, or what waits for its own
            # consumers leaves room for others, our own thread must know.
            return not (self._pool.needs_watching or self._dispatcher.isolating or self._dispatcher.held_back)
        except Exception as error:
            self._failure = error
            return False
        finally:
            self._pool.lock.release()

    @property
    def is_stopping(self) -> bool:
        """Whether nothing more is taken."""
        return self._stopping

    def lost(self) -> None:
        """Hear that deliveries have been lost; called in a fetcher's thread."""
        self._has_lost = True
        self._pool.wake()

    def timeout_of(self, tag: int) -> float | None:
        """Return the time limit of a job."""
        flight = self._flights.get(tag)
        return None if flight is None else self._consumer(flight).timeout

    def name_of(self, tag: int) -> str:
        """Return what people call a job: its message's id and queue."""
        flight = self._flights.get(tag)
        return f"job {tag}" if flight is None else f"{flight.delivery.id} of {flight.delivery.queue}"

    @property
    def in_hand(self) -> int:
        """How many deliveries are with this worker, waiting or running."""
        return len(self._flights) + sum(map(len, list(self._arrivals)))

    def turn(self, timeout: float) -> None:
        """Do one round: wait for events, settle, take what arrived, hand out jobs."""
        if self._hoard.is_watched:
            timeout = min(timeout, HOARDS_AFTER)
        with self._pool.lock:
            self._handle(self._pool.poll(timeout))
            if self._failure is not None:
                raise self._failure
            if self._has_lost:
                self._look_for_lost()
            self._admit()
            if self._stopping:
                self._finish_what_must()
            elif self._pool.is_stuck:
                # Others may have places for it.
                self._hold_nothing()
            else:
                self._dispatcher.dispatch()
                self._ask()

    def stop_fetching(self) -> None:
        """Take nothing more, and give back what has not started."""
        assert self._intake is not None
        with self._pool.lock:
            self._stopping = True
        self._intake.pause(_PAUSE_PATIENCE)
        with self._pool.lock:
            self._admit()
            self._finish_what_must()
            if not self._is_recalled:
                self._pool.give_back()

    def _finish_what_must(self) -> None:
        """Give back what waits, but for what was acknowledged beforehand: for that the pool goes on, or once more."""
        is_needed = self._dispatcher.start_anyway()
        self._release_waiting()
        if is_needed and self._is_recalled:
            self._pool.resume()
        elif not is_needed and not self._is_recalled:
            self._pool.recall()
        self._is_recalled = not is_needed

    def take_last(self, events: list[Event]) -> None:
        """Take the results that came while the pool was closing; nobody is charged for being closed."""
        self._handle([event for event in events if isinstance(event, Finished)])
        cut_off = [
            flight
            for event in events if isinstance(event, Died)
            for tag in event.running if (flight := self._flights.get(tag)) is not None and not flight.settled
        ]  # fmt: skip
        if cut_off:
            logger.warning(
                "cut off at the end: %d; these messages run again: %s",
                len(cut_off),
                ", ".join(f"{flight.delivery.queue} {flight.delivery.id}" for flight in cut_off),
                extra={"action": "cut_off"},
            )

    def release_all(self) -> None:
        """Give back everything that is still here, uncharged. Call it once nothing runs any more."""
        self._admit()
        for flight in list(self._flights.values()):
            if flight.settled:
                self._lament(flight, "worker")
            self.release(flight)

    # Events.

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Finished):
                self._finish(event)
            elif isinstance(event, Returned):
                # Each goes to the front.
                for tag in reversed(event.tags):
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
                if flight.lost:
                    self._adrift.remember_end(flight.delivery, outcome)
                flight.settled = True
            if not event.early:
                self._dispatcher.ended(flight)
                self._ended += 1
                self.tally.handled += flight.delivery.queue in self._auto_ack
                self._forget(flight)
                freed[flight.delivery.queue] += 1
        assert self._intake is not None
        if settlements:
            self._intake.settle(settlements)
        for queue, count in freed.items():
            self._intake.finished(queue, count)

    def _give_back(self, tag: int) -> None:
        flight = self._flights.get(tag)
        if flight is not None:
            self._dispatcher.ended(flight)
            self._wait_again(flight)

    def _wait_again(self, flight: Flight) -> None:
        if flight.lost:
            self.drop(flight)
        else:
            self._dispatcher.put(flight, front=True)

    def _look_for_lost(self) -> None:
        """Drop what is not ours any more and has not started; what runs is done with when it comes back meanwhile."""
        self._has_lost = False
        self._dispatcher.drop_lost()
        self._adrift.lose(self._flights.values())
        if self._adrift:
            self._pool.give_back()

    def forget_ends(self) -> None:
        """Have whatever comes back from now on run anew."""
        self._adrift.forget_ends()

    def _readopt(self, flight: Flight, delivery: Delivery) -> None:
        """Have a run settle its message, which was lost and has come back."""
        assert self._intake is not None
        # The old one counted as in hand until now.
        self._intake.finished(flight.delivery.queue)
        flight.delivery = delivery
        logger.info(
            "%s %s came back while it runs here; it is not run again",
            delivery.queue, delivery.id,
            extra={"action": "readopted", "queue": delivery.queue, "message_id": delivery.id},
        )  # fmt: skip

    @staticmethod
    def _lament(flight: Flight, who: str) -> None:
        """Tell of a message that was settled before its handler ended, which it will not now."""
        logger.error(
            "%s %s had been settled, which stands, when the %s ended that had it",
            flight.delivery.queue, flight.delivery.id, who,
            extra={"action": "failed_late", "queue": flight.delivery.queue, "message_id": flight.delivery.id},
        )  # fmt: skip

    def _examine(self, death: Died) -> None:
        """Charge whom a process died of, if that is known, and give the others their chance again."""
        for tag in (*death.running, *death.queued):
            flight = self._flights.get(tag)
            if flight is not None:
                self._dispatcher.ended(flight)
        running = [self._flights[tag] for tag in death.running if tag in self._flights]
        queued = [self._flights[tag] for tag in death.queued if tag in self._flights]
        finding = examine(death, running, queued, self._rules)
        self.tally.crashes += finding.crashed
        for flight in finding.over:
            self._lament(flight, "process")
            self.drop(flight)
        for flight in finding.again:
            self._wait_again(flight)
        for flight, outcome in finding.charged:
            self._settle(flight, outcome)
        if finding.suspects:
            logger.warning(
                "%d messages ran when the process died: %s; each runs alone now, to find the one that does it",
                len(finding.suspects),
                ", ".join(flight.delivery.id for flight in finding.suspects),
                extra={"action": "suspects"},
            )
        if finding.held_up:
            logger.warning(
                "one of %d messages has kept the others from running, past a time limit: %s; each runs alone now, to "
                "find the one that does it",
                len(finding.held_up),
                ", ".join(flight.delivery.id for flight in finding.held_up),
                extra={"action": "held_up"},
            )

    def _consumer(self, flight: Flight) -> Consumer:
        return self._turns[flight.delivery.queue].consumers[flight.consumer]

    def _rules(self, flight: Flight) -> tuple[Consumer, RetryPolicy]:
        consumer = self._consumer(flight)
        return consumer, consumer.policy(self._specs[consumer.queue].policy)

    # Arrivals and jobs.

    def _admit(self) -> None:
        assert self._intake is not None
        if self._has_lost:
            # What has just arrived may be what was lost before, and runs here.
            self._look_for_lost()
        while self._arrivals:
            for delivery in self._arrivals.popleft():
                if delivery.lost:
                    # The connection broke again before anybody saw it.
                    self._intake.finished(delivery.queue)
                    continue
                if self._adrift and (runs := self._adrift.find(delivery)) is not None:
                    self._readopt(runs, delivery)
                    continue
                flight = Flight(self._next_tag, delivery)
                self._next_tag += 1
                self._flights[flight.tag] = flight
                self._bytes += len(delivery.raw)
                self._size += (len(delivery.raw) - self._size) / 64
                if delivery.refused is not None:
                    self._settle(flight, delivery.refused)
                    continue
                if len(delivery.raw) > self._max_body + _HEADERS:
                    # As the process would that it was given to, which might not live to say so.
                    why = f"the message has {len(delivery.raw):,} bytes, the limit of a body is {self._max_body:,}"
                    self._settle(
                        flight, refused(UNDECODABLE, why, attempts=delivery.attempts, crashes=delivery.crashes)
                    )  # fmt: skip
                    continue
                end = self._adrift.end_of(delivery)
                if end is not None:
                    self._settle(flight, end)
                    continue
                auto_ack = delivery.queue in self._auto_ack
                if delivery.deliveries >= self._max_deliveries and not auto_ack:
                    end = given_up(delivery.deliveries, attempts=delivery.attempts, crashes=delivery.crashes)
                    self._settle(flight, end)
                    continue
                if auto_ack:
                    # The fetcher has acknowledged it already.
                    flight.settled = True
                self._dispatcher.put(flight, front=False)

    def _pace(self) -> float:
        """Return the handlers' ends a second."""
        now = monotonic()
        elapsed = now - self._paced_at
        if elapsed >= _PACE_OVER:
            self._per_second, self._ended, self._paced_at = self._ended / elapsed, 0, now
        return self._per_second

    def _ask(self) -> None:
        """Tell the fetchers how much to hold: what the places take, bounded by count and by bytes."""
        assert self._intake is not None
        if self._dispatcher.isolating:
            self._intake.hold(0)
            return
        # What runs in a place that takes no more, or none beside one that is alone, is in hand as well, and nobody
        # else's room.
        wanted = sum(
            place.window if self._dispatcher.takes_company(place) else len(place.tags) for place in self._pool.places
        )
        # Nor is what waits for its own consumers, which run as many as they may.
        wanted += self._dispatcher.held_back
        # What is finished while the broker is asked for more must be here already: a distant one takes its time.
        wanted += int(_AHEAD * self._pace() * self._intake.round_trip)
        if self._size:
            room = max(0, _HOLD_BYTES - self._bytes) / self._size
            wanted = min(wanted, max(len(self._pool.places), self.in_hand + int(room)))
        wanted = min(wanted, self._prefetch)
        self._intake.hold(wanted, self._dispatcher.held_back)
        self._give_surplus_back(wanted)

    def _give_surplus_back(self, wanted: int) -> None:
        """Give back what waits here although nobody will have time for it soon."""
        assert self._intake is not None
        if self._max_deliveries < _GIVES_BACK:
            # RabbitMQ counts a delivery for what is given back, and for so few a message would not run any more.
            return
        if not any(place.accepting and place.ready for place in self._pool.places):
            # Those that are starting take what was left.
            self._hoard.close()
            return
        in_hand, wanted = self.in_hand, max(0, wanted - self._dispatcher.held_back)
        if in_hand > 2 * wanted or self._hoard.is_watched:
            # Counted only where it may matter.
            in_hand -= self._dispatcher.bound
        surplus = self._hoard.surplus(in_hand, wanted, self._intake.shares, monotonic())
        if not surplus.messages:
            return
        last = self._dispatcher.take_last(surplus.messages)
        for flight in last:
            self.release(flight)
        if len(last) == surplus.messages:
            # What comes next, of a broker that has its share again, is no part of it.
            self._hoard.close()
        elif surplus.is_new:
            self._pool.give_back()

    # Ends.

    def _release_waiting(self) -> None:
        for flight in self._dispatcher.take_all():
            if flight.settled:
                self._dispatcher.put(flight, front=False)
            else:
                self.release(flight)

    def _hold_nothing(self) -> None:
        """Hold nothing as long as nothing can run, but for what was acknowledged: it runs here or never."""
        assert self._intake is not None
        self._intake.hold(0)
        for flight in self._dispatcher.take_all():
            if flight.settled or flight.suspected or flight.held_up or flight.is_near_deaths:
                # Or what may have taken the last process with it: it runs alone next, or nobody would ever be charged.
                self._dispatcher.put(flight, front=False)
            else:
                self.release(flight)

    def _settle(self, flight: Flight, outcome: Outcome) -> None:
        assert self._intake is not None
        if not flight.settled:
            self._note(flight, outcome)
            self._intake.settle([Settlement(flight.delivery, outcome)])
        self.drop(flight)

    def release(self, flight: Flight) -> None:
        """See `Hands.release`."""
        # Not as if it had been settled: it was not even tried, or not for long enough to prove anything.
        self._settle(flight, flight.delivery.as_it_came)

    def drop(self, flight: Flight) -> None:
        """See `Hands.drop`."""
        assert self._intake is not None
        if self._forget(flight):
            self._intake.finished(flight.delivery.queue)

    def when_settled(self, queue: str, call: Callable[[], None]) -> None:
        """See `Hands.when_settled`."""
        assert self._intake is not None
        self._intake.when_settled(queue, call)

    def _forget(self, flight: Flight) -> bool:
        if self._flights.pop(flight.tag, None) is None:
            return False
        self._bytes -= len(flight.delivery.raw)
        self._adrift.forget(flight)
        return True

    def _note(self, flight: Flight, outcome: Outcome) -> None:
        """Count an outcome, and log one that a person may want to know of."""
        if outcome.action == "done":
            self.tally.handled += 1
            return
        delivery = flight.delivery
        failure = outcome.failure
        what = failure.message if failure is not None else ""
        facts: dict[str, Any] = {"queue": delivery.queue, "message_id": delivery.id, "attempts": outcome.attempts}
        if failure is not None and failure.traceback:
            facts["traceback"] = failure.traceback
        if outcome.action == "retry":
            self.tally.retried += 1
            logger.warning(
                "%s %s failed (attempt %d), again in %.1f s: %s",
                delivery.queue, delivery.id, max(outcome.attempts, delivery.attempts + 1), outcome.delay, what,
                extra={"action": "retry", **facts},
            )  # fmt: skip
        elif outcome.action == "dead":
            self.tally.dead += 1
            self.tally.reasons[outcome.reason] += 1
            is_letter = self._specs[delivery.queue].dead_letter is None
            end = "failed for good, stays a dead letter and rests" if is_letter else "dead-lettered"
            logger.error(
                "%s %s %s, %s: %s",
                delivery.queue, delivery.id, end, outcome.reason, what,
                extra={"action": "dead", "reason": outcome.reason, **facts},
            )  # fmt: skip
        else:
            self.tally.released += 1
