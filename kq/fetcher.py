"""The thread that talks to the broker on a consumer's behalf: fetch, settle, renew.

It owns the feed, so no broker call ever blocks the code that watches over handlers, and a broker that
is away holds up nothing but deliveries. Others tell it how much they want to hold (`target`), hand in
settlements, and say when a delivery's place is free again.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread
from time import monotonic, sleep

from kq.admission import Admission
from kq.backend import Backend, Delivery, Feed, QueueSpec, Settlement, Settling, UntrustedBroker
from kq.driver import Driver
from kq.errors import Error, PermissionDenied
from kq.idleness import Idleness
from kq.outcome import DONE

logger = logging.getLogger("kq.worker")

#: Seconds between tries of a settlement that cannot be carried out: the first and the longest.
_SETTLE_AGAIN = (1.0, 5.0)
#: Rounds over which the time they take is averaged.
_ROUNDS = 4
#: Dead letters that are settled between two looks whether leases must be renewed.
_DEAD_AT_ONCE = 64
#: Seconds between tries against a broker that refuses us: it will not change its mind soon.
_BACKOFF_REFUSED = 30.0
#: How much of the time between two renewals may pass before the next try, where one has failed or the broker is away.
_SOONER = 0.25
#: Seconds before a broker that is away at the end is asked again to take what is settled.
_LAST_AGAIN = 0.2


class Fetcher(Thread):
    """Keeps up to `target` deliveries in its owner's hands, until stopped.

    Args:
        backend: The broker; the fetcher opens a feed of its own.
        queues: What to consume, declared already.
        driver: How long to wait before trying again to reach a broker that is away, and its name for the log.
        prefetch: Deliveries in hand at most, ever.
        lease: Seconds that a delivery stays ours without renewal.
        limits: Deliveries in hand at most of single queues, by id.
        auto_ack: Queues whose deliveries are settled as done before anybody sees them...
        admission: ...but not those that it refuses: they are handed over unsettled, as refused.
        on_deliveries: Called in this thread with what was fetched.
        on_lost: Called in this thread when deliveries turn out to be another worker's, as their ``lost`` says.
        idleness: Told when nothing is in hand, ready or due before ``idle_until()``.
        idle_until: Returns the moment, on the monotonic clock, until which to wait for what is due.
    """

    def __init__(
        self,
        backend: Backend,
        queues: Sequence[QueueSpec],
        *,
        driver: Driver,
        prefetch: int,
        lease: float,
        limits: Mapping[str, int] | None = None,
        auto_ack: Container[str] = (),
        admission: Admission | None = None,
        on_deliveries: Callable[[list[Delivery]], None],
        on_lost: Callable[[], None] = lambda: None,
        idleness: Idleness | None = None,
        idle_until: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(name=f"kq-fetcher {driver.name}".rstrip(), daemon=True)
        self._backend = backend
        self._queues = list(queues)
        self._driver = driver
        self._broker = f"the broker of driver {driver.name}" if driver.name else "the broker"
        self._prefetch = prefetch
        self._renew_every = lease / 3
        self._limits = dict(limits or {})
        self._auto_ack = auto_ack
        self._admission = admission
        self._specs = {queue.id: queue for queue in self._queues}
        self._on_deliveries = on_deliveries
        self._on_lost = on_lost
        self._losses = 0
        self._idleness = idleness
        if idleness is not None:
            idleness.add(self)
        self._idle_until = idle_until
        self._lock = Lock()
        #: Held from the decision how much to fetch until that is handed over.
        self._fetching = Lock()
        self._wanted = prefetch
        self._in_hand: Counter[str] = Counter()
        self._inbox: list[Settlement] = []
        #: What could not be settled, each with the moment of its next try and the wait after that.
        self._failed: list[tuple[float, float, Settlement]] = []
        #: Called once what was handed in so far has been carried out.
        self._on_settled: Callable[[], None] | None = None
        #: Whether that is waited for also while the broker is away.
        self._is_patient = True
        #: Whether somebody has said something since the last look.
        self._news = False
        #: Whether the broker took none of what was to be settled last, and may soon.
        self._is_blocked = False
        self._feed: Feed | None = None
        self._waiting = False
        self._stopping = Event()
        self._end_by = 0.0
        self._renew_at = 0.0
        self._failures = 0
        #: Why the broker is away, as has been said.
        self._away_for = ""
        self.in_hand = 0
        #: Seconds that it takes to settle and to fetch, on average.
        self.round_trip = 0.0
        self.error: Error | None = None

    @property
    def target(self) -> int:
        """How many deliveries to keep in hand."""
        return self._wanted

    def hold(self, target: int) -> None:
        """Say how many deliveries to keep in hand from now on; at most the prefetch."""
        target = min(target, self._prefetch)
        if target == self._wanted:
            return
        with self._lock:
            before, self._wanted = self._wanted, target
            # Whoever waits with room waits for messages, not for more room: a window that is shared with other
            # fetchers changes with each message of theirs, and each time would cost a call to this broker.
            opened = before <= self.in_hand < target
            if not (opened or 2 * target < before):
                return
            self._news = True
        self._wake()

    def look(self) -> None:
        """Look into the queues once more; see `Idleness`."""
        with self._lock:
            self._news = True
        self._wake()

    def pause(self, timeout: float) -> None:
        """Hold nothing new from now on; what was being fetched has been handed over when this returns.

        Args:
            timeout: Seconds to wait for that; a broker that hangs is not waited for longer.
        """
        self.hold(0)
        if self._fetching.acquire(timeout=timeout):
            self._fetching.release()

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Hand in settlements; they are carried out in order, and again if the broker was away."""
        with self._lock:
            self._inbox.extend(settlements)
            self._news = True
        self._wake()

    def when_settled(self, call: Callable[[], None], *, patient: bool = True) -> None:
        """Have ``call`` called, once, when nothing more is wanted and all that was is carried out.

        Or put off, where the broker does not take it now. In this thread; or at once, where that is not waited for.

        Args:
            call: What to call.
            patient: Whether to wait for a broker that is away, or refuses everything, to take what is settled.
        """
        if not patient and self.error is not None and not self._wanted:
            # It is not even asked for a while.
            call()
            return
        with self._lock:
            self._on_settled, self._is_patient = call, patient
            self._news = True
        self._wake()

    def finished(self, queue: str, count: int = 1) -> None:
        """Say that ``count`` deliveries of a queue are out of our hands, and leave room for others."""
        if self._idleness is not None:
            self._idleness.changed()
        with self._lock:
            self._in_hand[queue] -= count
            self.in_hand -= count
            self._news = True
        self._wake()

    def end(self, until: float) -> None:
        """Begin to settle what has been handed in, to release the rest, and to end.

        Args:
            until: Until when, of `time.monotonic`, a broker that is away is asked again to take what is settled.
        """
        self._end_by = until
        self._stopping.set()
        self._wake()

    def stop(self, timeout: float) -> bool:
        """End, as `end` does, within so many seconds; False if that took too long."""
        self.end(monotonic() + timeout)
        if self.is_alive():
            self.join(timeout)
        return not self.is_alive()

    def run(self) -> None:
        """Fetch, settle and renew until stopped."""
        while not self._stopping.is_set():
            try:
                self._step()
                if self._failures:
                    logger.info("%s is back", self._broker, extra={"action": "broker_back"})
                self._failures, self.error = 0, None
                self._say_lost()
            except Error as error:
                self._say_lost()
                self._say_settled(failing=True)
                self._back_off(error)
            except Exception:
                logger.exception("unexpected failure in the fetcher", extra={"action": "fetcher_failed"})
                self._say_lost()
                self._say_settled(failing=True)
                self._back_off(Error("unexpected failure"))
        self._end()

    def _step(self) -> None:
        if self._feed is None:
            self._feed = self._backend.feed(self._queues, self._prefetch)
            self._renew_at = monotonic() + self._renew_every
        feed = self._feed
        # Before anything is looked at: what comes after it is seen in the next step.
        self._news = False
        # Before anything that may fail: nothing else may cost us our leases.
        self._renew_if_due(feed)
        began = monotonic()
        settled = self._settle(feed)
        with self._fetching:
            fetched = self._fetch(feed)
        if fetched or settled:
            self.round_trip += (monotonic() - began - self.round_trip) / _ROUNDS
        if not self._wanted:
            feed.put_back()
        self._say_settled()
        if not fetched and not settled:
            self._wait(feed)

    def _fetch(self, feed: Feed) -> bool:
        deliveries = feed.fetch(*self._room())
        if not deliveries:
            return False
        try:
            deliveries = self._acknowledge(feed, deliveries)
        except BaseException:
            # They are ours, and nobody else sees them.
            self._return_unseen(deliveries)
            raise
        with self._lock:
            for delivery in deliveries:
                self._in_hand[delivery.queue] += 1
            self.in_hand += len(deliveries)
        if self._idleness is not None:
            self._idleness.changed()
        # What was lost may be among them.
        self._say_lost()
        self._on_deliveries(deliveries)
        return True

    def _settle(self, feed: Feed) -> bool:
        if not self._inbox and not self._failed:
            # What is handed in from here on is news.
            return False
        now = monotonic()
        again = [failed for failed in self._failed if failed[0] <= now]
        with self._lock:
            batch, self._inbox = self._inbox, []
        if not batch and not again:
            return False
        waits = {id(settlement): wait for _, wait, settlement in again}
        self._failed = [item for item in self._failed if item[0] > now]
        parts = _in_parts([*(settlement for _, _, settlement in again), *batch])
        try:
            while parts:
                settling = self._carry_out(feed, parts[0])
                del parts[0]
                self._note(settling, waits)
                if parts:
                    self._renew_if_due(feed)
        finally:
            # What was carried out before something failed is not to be tried again.
            left = [settlement for part in parts for settlement in part]
            if left:
                self._failed += [
                    (now, waits[id(settlement)], settlement) for settlement in left if id(settlement) in waits
                ]
                with self._lock:
                    self._inbox = [settlement for settlement in left if id(settlement) not in waits] + self._inbox
        return True

    def _note(self, settling: Settling, waits: Mapping[int, float]) -> None:
        """Put off what could not be carried out, and say what came too late."""
        self._is_blocked |= any(error.details.get("reason") == "blocked" for _, error in settling.failed)
        for settlement, error in settling.failed:
            self._put_off(settlement, error, waits.get(id(settlement), _SETTLE_AGAIN[0]))
        for settlement in settling.late:
            logger.info(
                "%s %s was settled too late: it was not ours any more, and may run again",
                settlement.delivery.queue,
                settlement.delivery.id,
                extra={"action": "settled_late"},
            )

    def _say_lost(self) -> None:
        if self._feed is not None and self._feed.losses != self._losses:
            self._losses = self._feed.losses
            self._on_lost()

    def _say_settled(self, *, failing: bool = False) -> None:
        """Say that nothing is left to be settled, if somebody waits for that.

        Args:
            failing: Whether the broker is away, or refuses: what waits for other brokers' messages is not to wait for
                this one's, and nobody for one that has nothing to settle.
        """
        if self._on_settled is None:
            return
        with self._lock:
            is_left = bool(self._inbox) and (self._is_patient or not failing)
            call = None if is_left or self._wanted else self._on_settled
            if call is not None:
                self._on_settled = None
        if call is not None:
            call()

    def _renew_if_due(self, feed: Feed) -> None:
        if monotonic() >= self._renew_at:
            feed.renew()
            self._renew_at = monotonic() + self._renew_every
            # Before anything is fetched: what was lost may come with it.
            self._say_lost()

    def _carry_out(self, feed: Feed, batch: list[Settlement]) -> Settling:
        try:
            return feed.settle(batch)
        except Error:
            raise
        except Exception:
            if len(batch) == 1:
                logger.exception("%s %s cannot be settled", batch[0].delivery.queue, batch[0].delivery.id)
                return Settling([], [(batch[0], Error("unexpected failure"))])
        # One of them is poison: the others are not to share its fate.
        parts = [self._carry_out(feed, [settlement]) for settlement in batch]
        return Settling(
            [late for part in parts for late in part.late], [failed for part in parts for failed in part.failed]
        )

    def _put_off(self, settlement: Settlement, error: Error, wait: float) -> None:
        delivery = settlement.delivery
        if wait == _SETTLE_AGAIN[0]:
            logger.error(
                "%s %s cannot be settled (%s) now: %s; trying again",
                delivery.queue, delivery.id, settlement.outcome.action, error,
                extra={"action": "settle_failed", "queue": delivery.queue, "message_id": delivery.id},
            )  # fmt: skip
        self._failed.append((monotonic() + wait, min(2 * wait, _SETTLE_AGAIN[1]), settlement))

    def _acknowledge(self, feed: Feed, deliveries: list[Delivery]) -> list[Delivery]:
        """Settle at once what runs at most once; what cannot be settled is not to run."""
        if not self._auto_ack:
            return deliveries
        at_once = [
            Settlement(delivery, DONE)
            for delivery in deliveries
            if delivery.queue in self._auto_ack and delivery.refused is None and self._admits(delivery)
        ]
        if not at_once:
            return deliveries
        late, failed = feed.settle(at_once)
        self._return_unseen([settlement.delivery for settlement, _ in failed])
        lost = {id(settlement.delivery) for settlement in (*late, *(settlement for settlement, _ in failed))}
        return [delivery for delivery in deliveries if id(delivery) not in lost]

    def _return_unseen(self, deliveries: Sequence[Delivery]) -> None:
        with self._lock:
            self._inbox.extend(Settlement(delivery, delivery.as_it_came) for delivery in deliveries)

    def _admits(self, delivery: Delivery) -> bool:
        if self._admission is None:
            return True
        refused = self._admission.refusal(self._specs[delivery.queue], delivery.raw, delivery.replayed)
        if refused is not None:
            delivery.refused = refused.outcome(delivery.attempts, delivery.crashes)
        return refused is None

    def _room(self) -> tuple[int, dict[str, int]]:
        with self._lock:
            # What is put off is nobody's any more, and held all the same.
            credit = max(0, self._wanted - self.in_hand - len(self._failed))
            caps = {queue: max(0, most - self._in_hand[queue]) for queue, most in self._limits.items()}
        return credit, caps

    def _wait(self, feed: Feed) -> None:
        soonest = min([self._renew_at, *(moment for moment, _, _ in self._failed)])
        timeout = max(0.0, soonest - monotonic())
        if self._idleness is not None and self._wanted and self._has_nothing():
            began = self._idleness.begin(self)
            due = feed.due_in()
            if due is None or monotonic() + due > self._idle_until():
                self._idleness.found_nothing(self, began)
            elif due == 0:
                return
            else:
                timeout = min(timeout, due)
        self._waiting = True
        try:
            # Whoever speaks from here on ends the wait; what was said before is seen here.
            if not self._news and not self._stopping.is_set():
                feed.wait(timeout)
        finally:
            self._waiting = False

    def _has_nothing(self) -> bool:
        # Owners hand in a settlement before they say that the delivery is out of their hands.
        with self._lock:
            return self.in_hand == 0 and not self._inbox and not self._failed

    def _wake(self) -> None:
        feed = self._feed
        if self._waiting and feed is not None:
            feed.wake()

    def _back_off(self, error: Error) -> None:
        self._failures += 1
        self.error = error
        if isinstance(error, (PermissionDenied, UntrustedBroker)):
            delay = _BACKOFF_REFUSED
        else:
            driver = self._driver
            delay = min(driver.reconnect_max, driver.reconnect_initial * 2.0 ** min(self._failures - 1, 100))
            if self.in_hand or self._failed:
                # Whatever is said of reconnecting: when the broker is back, our leases have to be renewed in time.
                delay = min(delay, self._renew_every * _SOONER)
        why = str(error)
        if self._failures == 1 or why != self._away_for:
            # Once for each reason: a broker that is back may refuse what it took before.
            self._away_for = why
            logger.warning("%s is away: %s; trying again", self._broker, error, extra={"action": "broker_away"})
        # What it refuses for one queue may be fine for the others, whose leases must be kept.
        self._wait_renewing(delay * random.uniform(0.75, 1.0), None if _is_away(error) else self._feed)

    def _wait_renewing(self, seconds: float, feed: Feed | None) -> None:
        """Wait before the next try, and keep the leases of a feed meanwhile; None where its broker is away.

        Then they are renewed first of all: what is in hand may leave nothing else to ask it for, by which to know that
        it is back, until they are about to end.
        """
        if feed is None:
            self._renew_at = 0.0
            self._stopping.wait(seconds)
            return
        until = monotonic() + seconds
        while not self._stopping.wait(max(0.0, min(until, self._renew_at) - monotonic())) and monotonic() < until:
            # A renewal that is refused is not to keep everything else from being tried, for ever.
            self._renew_at = monotonic() + self._renew_every * _SOONER
            with suppress(Exception):
                feed.renew()
                self._renew_at = monotonic() + self._renew_every

    def _end(self) -> None:
        feed = self._feed
        if feed is None:
            return
        try:
            self._settle_last(feed)
        finally:
            feed.close(max(0.0, self._end_by - monotonic()))

    def _settle_last(self, feed: Feed) -> None:
        """Settle what has been handed in; where the broker is away or blocked, again as long as there is time."""
        while True:
            self._failed = [(0.0, wait, settlement) for _, wait, settlement in self._failed]
            self._is_blocked = False
            try:
                self._settle(feed)
                if self._is_blocked and monotonic() + _LAST_AGAIN < self._end_by:
                    sleep(_LAST_AGAIN)
                    continue
            except Error as error:
                if _is_away(error) and monotonic() + _LAST_AGAIN < self._end_by:
                    sleep(_LAST_AGAIN)
                    continue
                logger.warning(
                    "%s did not take the last settlements: %s", self._broker, error, extra={"action": "settle_failed"}
                )
            return


def _is_away(error: Error) -> bool:
    """Tell whether a broker does not answer at all."""
    return error.details.get("reason") in ("unavailable", "timeout")


def _in_parts(batch: list[Settlement]) -> list[list[Settlement]]:
    """Return settlements in parts: of dead letters each may be a call, and leases must not be neglected for them."""
    dead = [settlement for settlement in batch if settlement.outcome.action == "dead"]
    if len(dead) <= _DEAD_AT_ONCE:
        return [batch]
    rest = [settlement for settlement in batch if settlement.outcome.action != "dead"]
    parts = [rest, *(dead[i : i + _DEAD_AT_ONCE] for i in range(0, len(dead), _DEAD_AT_ONCE))]
    return [part for part in parts if part]
