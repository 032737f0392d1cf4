"""Consuming from RabbitMQ: the broker pushes, a window bounds how much.

Deliveries carry the epoch of the link they came over. When a link breaks the broker gives its deliveries
to others; what is settled after that is too late, and is never acknowledged over another link, where
the same tag means another message.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from time import monotonic
from types import TracebackType
from typing import Any, Final
from uuid import uuid4

import amqp

from kq.backend import Delivery, QueueSpec, Settlement, Settling
from kq.backends.rabbitmq_arrivals import Arrivals
from kq.backends.rabbitmq_aside import Aside
from kq.backends.rabbitmq_copies import Copies
from kq.backends.rabbitmq_delivery import Receive
from kq.backends.rabbitmq_error import RabbitErrors, away
from kq.backends.rabbitmq_link import CLOSE_TIMEOUT, Link
from kq.backends.rabbitmq_receipt import Receipt, envelope_of, pack
from kq.backends.rabbitmq_recollection import Named, Recollection
from kq.backends.rabbitmq_sender import Courier
from kq.backends.rabbitmq_subscriptions import Subscriptions
from kq.backends.rabbitmq_topology import counters, due_in, is_classic, read_count, without_history
from kq.backends.rabbitmq_watch import Watch
from kq.backends.rabbitmq_window import Demand, Widen, Windows
from kq.envelope import DELIVERIES, Envelope
from kq.errors import Conflict, Error, NotFound, PermissionDenied
from kq.waker import Lookout, Waker

logger = logging.getLogger("kq.worker")

#: Seconds between two ticks of the heartbeat.
_TICK: Final = 1.0
#: Seconds within which a message counts as due.
_DUE: Final = 0.001
#: Seconds before what could not be sent on is tried again where there is nothing else to do.
_AGAIN: Final = 0.1


class RabbitFeed:
    """A consumer of queues. One thread's, but for `wake`.

    Args:
        url: For errors.
        open_link: Opens a link for consuming.
        courier: Publishes with confirms; for retries, dead letters and steps of delays.
        declare: Makes a queue and its dead-letter queue where they are missing.
        probe: Returns what `rabbitmq_aside.probe` does, over another link.
        soonest: Returns the seconds until one is due that this process has published, as `Due.soonest`.
        queues: What to consume.
        prefetch: The widest window.
    """

    def __init__(
        self,
        url: str,
        open_link: Callable[[], Link],
        *,
        courier: Courier,
        declare: Callable[[QueueSpec], None],
        probe: Callable[[str], list[str] | None],
        soonest: Callable[[], float | None],
        queues: Sequence[QueueSpec],
        prefetch: int,
    ) -> None:
        self._guard = _Guard(url, self)
        self._open_link = open_link
        self._declare = declare
        self._probe = probe
        self._soonest = soonest
        self._specs = {queue.id: queue for queue in queues}
        self._copies = Copies(courier, self._specs, self._declared)
        self._link: Link | None = None
        self._epoch = 0
        #: Whether a queue turned out to be gone.
        self._missing = False
        self._aside = Aside(self._specs)
        self._windows = Windows(prefetch)
        self._arrivals = Arrivals(self._specs)
        #: Unsettled deliveries of this epoch by tag, in the order of arrival.
        self._outstanding: dict[int, Delivery] = {}
        self._held_of: Counter[str] = Counter()
        #: What is published anew and not handed over: what came back before its time, and what must be counted.
        self._onward: list[Delivery] = []
        #: What is acknowledged and not handed over.
        self._done_before: list[Delivery] = []
        self._tick_at = 0.0
        self._recollection = Recollection()
        self._named = Named()
        self._watch = Watch(self._specs, monotonic())
        self.losses = 0
        self._waker = Waker()
        self._closed = False
        try:
            self._connected()
        except BaseException:
            self._waker.close()
            raise

    def fetch(self, credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        """See `Feed.fetch`."""
        with self._guard:
            link = self._connected()
            link.drain_all()
            self._fit(link, credit, caps)
        self._acknowledge_done()
        self._send_onward()
        deliveries = self._arrivals.take(credit, caps)
        for delivery in deliveries:
            self._held_of[delivery.queue] += 1
        return deliveries

    def settle(self, settlements: Sequence[Settlement]) -> Settling:
        """See `Feed.settle`."""
        now = monotonic()
        for settlement in settlements:
            if not settlement.delivery.receipt.is_named:
                # It is known as long as it runs.
                self._named.forget(settlement.delivery.id)
            elif settlement.outcome.action == "done":
                # Also what is late: it may come back to us.
                self._recollection.done(settlement.delivery, settlement.delivery.receipt.epoch, now)
            else:
                self._recollection.not_done(settlement.delivery)
        late = [s for s in settlements if not self._is_ours(s.delivery)]
        ours = [s for s in settlements if self._is_ours(s.delivery)] if late else list(settlements)
        if any(s.outcome.action == "release" for s in ours):
            # Before anything makes room in the window: what is pushed then and not wanted is counted when it goes back.
            with self._guard:
                self._connected()
                self._unsubscribe()
        copied = [s for s in ours if self._needs_copy(s)]
        failed: list[tuple[Settlement, Error]] = []
        if copied:
            results = self._copies.publish([(s.delivery, s.outcome) for s in copied])
            for settlement, error in zip(copied, results, strict=True):
                if error is not None:
                    failed.append((settlement, error))
                else:
                    self._recollection.copied(settlement.delivery)
        if failed:
            stay = {id(settlement) for settlement, _ in failed}
            ours = [s for s in ours if id(s) not in stay]
        if not ours:
            # Nothing to ask a broker for that may be away.
            return Settling(late, failed)
        with self._guard:
            link = self._connected()
            rejected = {s.delivery.receipt.tag for s in ours if self._goes_back(s)}
            self._ack(link, {s.delivery.receipt.tag for s in ours} - rejected)
            if rejected:
                self._give_back(link, rejected)
        for settlement in ours:
            self._held_of[settlement.delivery.queue] -= 1
        return Settling(late, failed)

    def _declared(self, queue: QueueSpec) -> Error | None:
        try:
            self._declare(queue)
        except Error as error:
            return error
        return None

    def put_back(self) -> None:
        """See `Feed.put_back`: the broker pushes as much as the window allows."""
        if self._link is None:
            return
        with self._guard:
            self._unsubscribe()
            self._link.drain_all()
        buffered = list(self._arrivals)
        if buffered:
            self._release(buffered)
        with self._guard:
            # The answer says that the broker has read all that was settled: a process that is killed may take what
            # it has only written along.
            self._connected().channel.basic_qos(0, 1, False)

    def _release(self, buffered: list[Delivery]) -> None:
        self._arrivals.clear()
        # Counted as held until now by nobody.
        self._held_of.update(delivery.queue for delivery in buffered)
        settling = self.settle([Settlement(delivery, delivery.as_it_came) for delivery in buffered])
        for settlement, _ in settling.failed:
            # Not taken now, by a broker that is blocked, say. Handed over as soon as somebody wants it, or tried again.
            delivery = settlement.delivery
            if not self._is_ours(delivery):
                continue
            self._held_of[delivery.queue] -= 1
            if self._copies.go_on(delivery):
                self._onward.append(delivery)
            else:
                self._arrivals.add(delivery.receipt.tag, delivery)

    def due_in(self) -> float | None:
        """See `Feed.due_in`; other processes' delays and deliveries are unknown to RabbitMQ's clients."""
        with self._guard:
            link = self._connected()
            # The broker's channel takes the answer to a count before what came to it earlier: a delivery may
            # have left the queue and not yet been sent. It is sent before whatever is asked next is answered.
            waiting = self._count(link) or self._count(link)
            link.drain_all()
        if waiting or self._arrivals or self._done_before:
            return 0.0
        if self._onward:
            # Which cannot be sent on now.
            return _AGAIN
        soonest = self._soonest()
        return None if soonest is None else max(0.02, soonest)

    def _count(self, link: Link) -> int:
        queues = [queue for queue in self._specs if queue not in self._aside]
        return sum(link.channel.queue_declare(queue, passive=True).message_count for queue in queues)

    def renew(self) -> None:
        """See `Feed.renew`: the connection is the lease, and heartbeats keep it."""
        if self._link is not None:
            self._tick()

    def wait(self, timeout: float) -> None:
        """See `Feed.wait`."""
        # Nothing else may happen before the window may be widened: handlers can be slow.
        until = min(monotonic() + timeout, self._windows.widen_at, self._aside.next_at)
        while True:
            with self._guard:
                link = self._connected()
                before = len(self._outstanding)
                self._watch_over(link)
                if len(self._outstanding) > before:
                    # It came with the answer, and nothing of it is left to be read.
                    return
                step = max(0.0, min(until - monotonic(), _TICK))
                step = 0.0 if (pending := link.pending) else step
                ready = self._lookout.ready(step)
            if self._waker in ready:
                self._waker.drain()
            self._tick()
            if ready or pending or monotonic() >= until:
                return

    def wake(self) -> None:
        """See `Feed.wake`."""
        self._waker.wake()

    def close(self, patience: float = 0.0) -> None:
        """See `Feed.close`: the broker takes back what is unsettled when the channel goes."""
        if self._closed:
            return
        try:
            with suppress(Error):
                # The goodbye takes its time, too.
                self._wait_for_onward(monotonic() + patience - CLOSE_TIMEOUT)
        finally:
            self._closed = True
            self._drop_link(wait=True)
            self._copies.close()
            self._waker.close()

    # The link.

    def _connected(self) -> Link:
        if self._link is None:
            if self._missing:
                self._declare_all()
            self._link = self._open_link()
            self._recollection.connected(monotonic())
            self._epoch += 1
            self._lookout = Lookout(self._link.connection.sock, self._waker)
            self._subscriptions = Subscriptions(self._link, self._specs, self._receiver, self._cancelled)
        return self._link

    def _declare_all(self) -> None:
        """Make what somebody has deleted; what cannot be had is set aside, if that leaves anything."""
        refused: dict[str, Error] = {}
        for queue in self._specs.values():
            try:
                self._declare(queue)
            except (NotFound, PermissionDenied, Conflict) as error:
                refused[queue.id] = error
        if len(refused) == len(self._specs):
            raise next(iter(refused.values()))
        for id, refusal in refused.items():
            self._aside.put(id, refusal.message, monotonic())
        self._missing = False

    def _try_again(self) -> None:
        """See whether queues that were set aside can be consumed by now."""
        for queue in self._aside.due(monotonic()):
            try:
                seen = self._probe(queue)
            except NotFound:
                seen = [] if self._declared(self._specs[queue]) is None else None
            except Error:
                # Not over our own link, on which it would cost all that the others have.
                continue
            if seen is not None:
                for id in seen:
                    self._recollection.went_back(queue, id)
                self._aside.end(queue)

    def _drop_link(self, *, wait: bool = False) -> None:
        """Give the link up.

        Args:
            wait: Whether to say goodbye first; a broken link does not answer.
        """
        link, self._link = self._link, None
        # What still arrives while the link is closed goes back to the broker: it is no delivery of ours.
        self._epoch += 1
        self._recollection.broke(monotonic())
        known = {delivery.receipt.tag for delivery in self._done_before}
        # Those that came first run, and are to be remembered if not all can be.
        for tag, delivery in reversed(self._outstanding.items()):
            delivery.lost = True
            self._copies.forget(delivery)
            if not self._closed:
                self._recollection.went_back(delivery.queue, delivery.id)
                if not delivery.receipt.is_named:
                    self._named.remember(delivery.queue, envelope_of(delivery))
                elif tag not in known:
                    # What has been done here under its id was another one, that is like it; this one comes back.
                    self._recollection.not_done(delivery)
        self.losses += len(self._outstanding)
        self._outstanding.clear()
        self._onward.clear()
        self._done_before.clear()
        self._watch.forget()
        self._held_of.clear()
        self._arrivals.clear()
        if link is not None:
            link.close(wait=wait)

    def _tick(self) -> None:
        """See to heartbeats, ours and the broker's, every `_TICK`."""
        now = monotonic()
        if now < self._tick_at:
            return
        self._tick_at = now + _TICK
        with self._guard:
            self._connected().connection.heartbeat_tick()

    def _watch_over(self, link: Link) -> None:
        """See that a queue of which nothing comes is empty; else this link is not what it seems, and is given up."""
        now = monotonic()
        queue = self._watch.dead(self._has_room, now)
        if queue is not None:
            logger.warning(
                "the worker gets nothing of queue %s although messages wait in it; connecting anew",
                queue, extra={"action": "watchdog", "queue": queue},
            )  # fmt: skip
            raise amqp.exceptions.RecoverableConnectionError(f"RabbitMQ sends nothing of queue {queue}")
        queue = self._watch.due(self._has_room, now)
        if queue is not None and link.channel.queue_declare(queue, passive=True).message_count:
            # From now on: the answer may have taken its time.
            self._watch.waits(queue, monotonic())

    def _has_room(self, queue: str) -> bool:
        # All that is not settled fills the broker's window, whether somebody has fetched it or not.
        outstanding = sum(delivery.queue == queue for delivery in self._outstanding.values())
        return outstanding < self._subscriptions.windows[queue] and not self._exclusive(queue)

    def _exclusive(self, queue: str) -> bool:
        """Tell whether messages may wait for another consumer than us: the only one that is active."""
        return bool(self._specs[queue].options.get("amqp", {}).get("arguments", {}).get("x-single-active-consumer"))

    # The window.

    def _fit(self, link: Link, credit: int, caps: Mapping[str, int]) -> None:
        """Subscribe with windows that fit what is wanted, as `Windows` decides, and take what that brings."""
        windows = self._subscriptions.windows
        if credit <= 0 and not self._subscriptions:
            # Nothing is wanted, and nothing subscribed to.
            return

        def is_enough() -> bool:
            return self._arrivals.ready(credit, caps) >= credit

        if self._aside:
            self._try_again()
        demands = {}
        for queue in self._specs:
            if queue in self._aside:
                continue
            held = self._held_of[queue]
            wanted = min(credit, caps.get(queue, credit)) + held
            demands[queue] = Demand(wanted, held + self._arrivals.count(queue))
        change = self._windows.decide(windows, demands, is_enough=is_enough(), now=monotonic())
        if isinstance(change, Widen):
            self._subscribe(change.windows, is_enough)
            link.drain_all()
        elif change is not None and self._arrivals:
            # Pushed for wider windows than anybody needs now: others may have a use for it.
            self._give_back(link, set())
            # There is room for what is wanted.
            self._fit(link, credit, caps)
        elif change is not None:
            self._subscribe(change.windows)

    def _subscribe(self, windows: Mapping[str, int], is_enough: Callable[[], bool] | None = None) -> None:
        """See `Subscriptions.change`."""
        self._windows.changed(monotonic())
        if not self._subscriptions.change(windows, is_enough):
            # As soon as more is wanted; what has come by then has made room for others to be first.
            self._windows.hurry()

    def _unsubscribe(self) -> None:
        """Have nothing more sent; what is on its way is taken."""
        self._subscribe(dict.fromkeys(self._specs, 0))
        self._windows.hurry()

    def _cancelled(self, tag: str) -> None:
        self._missing = True
        raise amqp.exceptions.RecoverableConnectionError(f"RabbitMQ cancelled the consumer {tag}: its queue is gone")

    def _receiver(self, queue: str) -> Receive:
        epoch = self._epoch
        # Whoever looks into a queue is counted by the broker as one more delivery that nobody settled; and
        # into the dead letters, people do look.
        counted = self._specs[queue].dead_letter is not None
        # Classic queues count nothing: they only say that a message was delivered before.
        uncounting = is_classic(self._specs[queue])

        def receive(tag: int, redelivered: bool, envelope: Envelope, body: list[bytes]) -> None:
            if epoch != self._epoch:
                return
            headers = envelope.headers
            envelope.headers = without_history(headers)
            attempts, crashes = counters(headers)
            is_named = bool(envelope.id)
            if not is_named:
                envelope.id = self._named.again(queue, envelope, b"".join(body)) if redelivered else uuid4().hex
            # Deliveries that nobody settled: those that a copy brought along, and the broker's since then.
            brought = read_count(headers, DELIVERIES) if counted else 0
            since = _since(headers, redelivered, uncounting) if counted else 0
            # But not those that were lost with a connection of ours, or given back.
            others = max(0, since - self._recollection.losses(queue, envelope.id)) if since else 0
            delivery = Delivery(
                queue,
                envelope.id,
                pack(envelope, body),
                read_count(headers, attempts),
                read_count(headers, crashes),
                brought + others,
                Receipt(epoch, tag, envelope, sum(map(len, body)), uncounting or brought + since > 0, is_named),
            )
            self._outstanding[tag] = delivery
            self._watch.arrived(queue)
            if redelivered and self._recollection.is_done(delivery, epoch, monotonic()):
                # It was done here, and only the acknowledgement got lost; which may happen once more.
                self._recollection.done(delivery, epoch, monotonic())
                self._done_before.append(delivery)
                return
            if not redelivered and self._recollection:
                self._recollection.is_another(queue, envelope.id)
            if due_in(headers) > _DUE or (uncounting and others):
                self._onward.append(delivery)
            else:
                self._arrivals.add(tag, delivery)

        return receive

    # Settling.

    def _is_ours(self, delivery: Delivery) -> bool:
        receipt: Receipt = delivery.receipt
        return receipt.epoch == self._epoch and receipt.tag in self._outstanding

    def _goes_back(self, settlement: Settlement) -> bool:
        delivery = settlement.delivery
        # Else a fresh copy says what is true.
        return settlement.outcome.action == "release" and not delivery.receipt.copied and not delivery.receipt.counted

    def _needs_copy(self, settlement: Settlement) -> bool:
        is_copied: bool = settlement.delivery.receipt.copied
        return not (is_copied or settlement.outcome.action == "done" or self._goes_back(settlement))

    def _ack(self, link: Link, tags: set[int]) -> None:
        """Acknowledge, with as few frames as the order allows."""
        last = 0
        for tag in list(takewhile(tags.__contains__, self._outstanding)):
            del self._outstanding[tag]
            tags.discard(tag)
            last = tag
        for tag in tags:
            self._outstanding.pop(tag, None)
        if last or tags:
            # The broker looks each up from the oldest on.
            link.acknowledge(last, sorted(tags))

    def _give_back(self, link: Link, tags: set[int]) -> None:
        """Reject deliveries in order, and with them what waits here behind them.

        Unsubscribed first: else the broker would push them right back, behind what it pushed before.
        """
        self._unsubscribe()
        back = self._arrivals.remove(lambda delivery: not delivery.receipt.counted)
        tags.update(delivery.receipt.tag for delivery in back)
        for tag in tags:
            delivery = self._outstanding.pop(tag, None)
            if delivery is not None:
                self._recollection.went_back(delivery.queue, delivery.id)
        if tags:
            link.give_back(sorted(tags))

    def _acknowledge_done(self) -> None:
        if self._done_before:
            with self._guard:
                link = self._connected()
                self._ack(link, {delivery.receipt.tag for delivery in self._done_before if self._is_ours(delivery)})
            self._done_before.clear()

    def _send_onward(self) -> None:
        """Publish anew what came back from a delay's step before its time, and what must be counted."""
        if not self._onward:
            return
        onward, self._onward = self._onward, []
        results = self._copies.publish([(delivery, None) for delivery in onward])
        with self._guard:
            link = self._connected()
            sent = set()
            for delivery, error in zip(onward, results, strict=True):
                if not self._is_ours(delivery):
                    continue
                if error is None:
                    sent.add(delivery.receipt.tag)
                else:
                    self._onward.append(delivery)
            self._ack(link, sent)

    def _wait_for_onward(self, until: float) -> None:
        """Wait for what may be on its way onward: it is stored as well as what it stands for, which would go back."""
        while any(delivery.receipt.copy is not None for delivery in self._onward) and monotonic() < until:
            self._copies.wait(max(0.0, min(until - monotonic(), _TICK)))
            with self._guard:
                # Else the broker seems to be silent.
                self._connected().drain_all()
            self._tick()
            self._send_onward()


class _Guard(RabbitErrors):
    """Drops the link after any error, and turns the error into ours."""

    def __init__(self, url: str, feed: RabbitFeed) -> None:
        super().__init__(url)
        self._feed = feed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (amqp.exceptions.NotFound, NotFound)):
            self._feed._missing = True
        elif isinstance(
            error, (amqp.exceptions.AccessRefused, amqp.exceptions.ResourceLocked)
        ) and self._feed._aside.refused(error, monotonic()):
            self._feed._drop_link()
            # At once, without what cannot be had.
            raise away(f"{self._where}: {error.reply_text}", "refused") from None
        if isinstance(error, Exception):
            self._feed._drop_link()
        super().__exit__(kind, error, trace)


def _since(headers: Mapping[str, Any], redelivered: bool, uncounting: bool) -> int:
    """Return how many deliveries that nobody settled the broker has counted of this copy of a message."""
    # Only a redelivery has been counted by the broker; on a first one it is a publisher's word.
    return 0 if not redelivered else 1 if uncounting else read_count(headers, "x-delivery-count")
