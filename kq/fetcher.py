"""The thread that talks to the broker on a consumer's behalf: fetch, settle, renew.

It owns the feed, so no broker call ever blocks the code that watches over handlers, and a broker that
is away holds up nothing but deliveries. Others tell it how much they want to hold (`target`), hand in
settlements, and say when a delivery's place is free again.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import Event, Lock, Thread
from time import monotonic

from kq.backend import Backend, Delivery, Feed, QueueSpec, Settlement
from kq.errors import Error, PermissionDenied

logger = logging.getLogger("kq.worker")

#: Seconds between tries to reach a broker that is away: from the first to the last, with jitter.
_BACKOFF = (0.1, 2.0)
#: Seconds between tries against a broker that refuses us: it will not change its mind soon.
_BACKOFF_REFUSED = 30.0


class Fetcher(Thread):
    """Keeps up to `target` deliveries in its owner's hands, until stopped.

    Args:
        backend: The broker; the fetcher opens a feed of its own.
        queues: What to consume, declared already.
        prefetch: Deliveries in hand at most, ever.
        lease: Seconds that a delivery stays ours without renewal.
        limits: Deliveries in hand at most of single queues, by id.
        on_deliveries: Called in this thread with what was fetched.
        on_idle: Called in this thread when nothing is in hand, ready or due before ``idle_until()``.
        idle_until: Returns the moment, on the monotonic clock, until which to wait for what is due.
    """

    def __init__(
        self,
        backend: Backend,
        queues: Sequence[QueueSpec],
        *,
        prefetch: int,
        lease: float,
        limits: Mapping[str, int] | None = None,
        on_deliveries: Callable[[list[Delivery]], None],
        on_idle: Callable[[], None] | None = None,
        idle_until: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(name="kq-fetcher", daemon=True)
        self._backend = backend
        self._queues = list(queues)
        self._prefetch = prefetch
        self._renew_every = lease / 3
        self._limits = dict(limits or {})
        self._on_deliveries = on_deliveries
        self._on_idle = on_idle
        self._idle_until = idle_until
        self._lock = Lock()
        self._target = prefetch
        self._in_hand: Counter[str] = Counter()
        self._inbox: list[Settlement] = []
        self._feed: Feed | None = None
        self._waiting = False
        self._stopping = Event()
        self._renew_at = 0.0
        self._failures = 0
        self.in_hand = 0
        self.error: Error | None = None

    def hold(self, target: int) -> None:
        """Say how many deliveries to keep in hand from now on; at most the prefetch."""
        target = min(target, self._prefetch)
        if target != self._target:
            self._target = target
            self._wake()

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Hand in settlements; they are carried out in order, and again if the broker was away."""
        with self._lock:
            self._inbox.extend(settlements)
        self._wake()

    def finished(self, queue: str, count: int = 1) -> None:
        """Say that ``count`` deliveries of a queue are out of our hands, and leave room for others."""
        with self._lock:
            self._in_hand[queue] -= count
            self.in_hand -= count
        self._wake()

    def stop(self, timeout: float) -> bool:
        """Settle what has been handed in, release the rest, and end; False if that took too long."""
        self._stopping.set()
        self._wake()
        if self.is_alive():
            self.join(timeout)
        return not self.is_alive()

    def run(self) -> None:
        """Fetch, settle and renew until stopped."""
        while not self._stopping.is_set():
            try:
                self._step()
                if self._failures:
                    logger.info("the broker is back", extra={"action": "broker_back"})
                self._failures, self.error = 0, None
            except Error as error:
                self._back_off(error)
            except Exception:
                logger.exception("unexpected failure in the fetcher", extra={"action": "fetcher_failed"})
                self._back_off(Error("unexpected failure"))
        self._end()

    def _step(self) -> None:
        if self._feed is None:
            self._feed = self._backend.feed(self._queues, self._prefetch)
            self._renew_at = monotonic() + self._renew_every
        feed = self._feed
        settled = self._settle(feed)
        if monotonic() >= self._renew_at:
            feed.renew()
            self._renew_at = monotonic() + self._renew_every
        deliveries = feed.fetch(*self._room())
        if deliveries:
            with self._lock:
                self._in_hand.update(Counter(delivery.queue for delivery in deliveries))
                self.in_hand += len(deliveries)
            self._on_deliveries(deliveries)
        elif not settled:
            self._wait(feed)

    def _settle(self, feed: Feed) -> bool:
        with self._lock:
            batch, self._inbox = self._inbox, []
        if not batch:
            return False
        try:
            late = feed.settle(batch)
        except BaseException:
            with self._lock:
                self._inbox = batch + self._inbox
            raise
        for settlement in late:
            logger.info(
                "%s %s was settled too late: its lease had run out, it runs again elsewhere",
                settlement.delivery.queue,
                settlement.delivery.id,
                extra={"action": "settled_late"},
            )
        return True

    def _room(self) -> tuple[int, dict[str, int]]:
        with self._lock:
            credit = max(0, self._target - self.in_hand)
            caps = {queue: max(0, most - self._in_hand[queue]) for queue, most in self._limits.items()}
        return credit, caps

    def _wait(self, feed: Feed) -> None:
        timeout = max(0.0, self._renew_at - monotonic())
        if self._on_idle is not None and self._target and self._has_nothing():
            due = feed.due_in()
            if due is None or monotonic() + due > self._idle_until():
                self._on_idle()
            elif due == 0:
                return
            else:
                timeout = min(timeout, due)
        self._waiting = True
        try:
            with self._lock:
                busy = bool(self._inbox)
            if not busy and not self._stopping.is_set():
                feed.wait(timeout)
        finally:
            self._waiting = False

    def _has_nothing(self) -> bool:
        # Owners hand in a settlement before they say that the delivery is out of their hands.
        with self._lock:
            return self.in_hand == 0 and not self._inbox

    def _wake(self) -> None:
        feed = self._feed
        if self._waiting and feed is not None:
            feed.wake()

    def _back_off(self, error: Error) -> None:
        self._failures += 1
        self.error = error
        first, last = _BACKOFF
        if isinstance(error, PermissionDenied):
            delay = _BACKOFF_REFUSED
        else:
            delay = min(last, first * 2 ** min(self._failures - 1, 10))
        if self._failures == 1:
            logger.warning("the broker is away: %s; trying again", error, extra={"action": "broker_away"})
        self._stopping.wait(delay * random.uniform(0.5, 1.0))

    def _end(self) -> None:
        feed = self._feed
        if feed is None:
            return
        try:
            self._settle(feed)
        except Error as error:
            logger.warning("could not settle at the end: %s", error, extra={"action": "settle_failed"})
        finally:
            feed.close()
