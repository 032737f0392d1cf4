"""Consuming from RabbitMQ: the broker pushes, a window bounds how much.

Deliveries carry the epoch of the link they came over. When a link breaks the broker gives its deliveries
to others; what is settled after that is too late, and is never acknowledged over another link, where
the same tag means another message.
"""

from __future__ import annotations

import select
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic, time
from typing import Any, Final

import amqp

from kq.backend import Delivery, Envelope, Publication, QueueSpec, Settlement, Settling, bury, pack
from kq.backends.rabbitmq_link import Link, mapped
from kq.backends.rabbitmq_topology import (
    counters,
    due_in,
    read_count,
    to_envelope,
    without_history,
)
from kq.errors import Error, NotFound
from kq.waker import Waker

#: Seconds between two ticks of the heartbeat.
_TICK: Final = 1.0
#: Seconds between two changes of the window, up and down.
_WIDEN_EVERY: Final = 0.05
_NARROW_AFTER: Final = 5.0
#: Seconds within which a message counts as due.
_DUE: Final = 0.001
#: Seconds that a message waits outside a full queue before it comes back to it.
_ASIDE: Final = 0.01


@dataclass(eq=False)
class _Receipt:
    """How to settle a delivery."""

    epoch: int
    tag: int
    message: Any
    #: Whether what takes its place is stored: it is never published twice.
    copied: bool = False


class RabbitFeed:
    """A consumer of queues. One thread's, but for `wake`.

    Args:
        url: For errors.
        open_link: Opens a link for consuming.
        publish: Publishes with confirms; for retries, dead letters and steps of delays.
        declare: Makes a queue and its dead-letter queue where they are missing.
        queues: What to consume.
        prefetch: The widest window.
    """

    def __init__(
        self,
        url: str,
        open_link: Callable[[], Link],
        *,
        publish: Callable[[Sequence[Publication]], list[Error | None]],
        declare: Callable[[QueueSpec], None],
        queues: Sequence[QueueSpec],
        prefetch: int,
    ) -> None:
        self._url = url
        self._open_link = open_link
        self._publish = publish
        self._declare = declare
        self._specs = {queue.id: queue for queue in queues}
        self._prefetch = prefetch
        self._link: Link | None = None
        self._epoch = 0
        #: Whether a queue turned out to be gone.
        self._missing = False
        self._windows: dict[str, int] = {}
        self._tags: dict[str, str] = {}
        self._subscribed = 0
        self._changed_at = 0.0
        #: When a window that is too narrow may be widened; until then a change is too soon.
        self._widen_at = inf
        self._narrow_since: float | None = None
        self._buffers: dict[str, deque[Delivery]] = {queue: deque() for queue in self._specs}
        #: Unsettled deliveries of this epoch by tag, in the order of arrival.
        self._outstanding: dict[int, Delivery] = {}
        self._held_of: Counter[str] = Counter()
        self._early: list[Delivery] = []
        self._due: list[float] = []
        self._waker = Waker()
        self._closed = False
        try:
            self._connected()
        except BaseException:
            self._waker.close()
            raise

    def fetch(self, credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        """See `Feed.fetch`."""
        with self._guarded():
            link = self._connected()
            self._fit(link, credit, caps)
            link.drain_all()
        self._send_on_early()
        deliveries: list[Delivery] = []
        for queue, buffer in self._buffers.items():
            room = min(credit - len(deliveries), caps.get(queue, credit))
            while buffer and room > 0:
                deliveries.append(buffer.popleft())
                room -= 1
        # Round and round, so that no queue is always first.
        first = next(iter(self._buffers))
        self._buffers[first] = self._buffers.pop(first)
        self._held_of.update(delivery.queue for delivery in deliveries)
        return deliveries

    def settle(self, settlements: Sequence[Settlement]) -> Settling:
        """See `Feed.settle`."""
        late = [s for s in settlements if not self._is_ours(s.delivery)]
        ours = [s for s in settlements if self._is_ours(s.delivery)] if late else list(settlements)
        copies = [(s, copy) for s in ours if not s.delivery.receipt.copied and (copy := self._copy(s)) is not None]
        failed: list[tuple[Settlement, Error]] = []
        if copies:
            # The new copy is confirmed before the old one goes: both exist for a moment, never neither.
            for (settlement, copy), error in zip(copies, self._publish_copies(copies), strict=True):
                if error is not None:
                    failed.append((settlement, error))
                    continue
                settlement.delivery.receipt.copied = True
                if copy.delay > 0:
                    self._due.append(time() + copy.delay)
        if failed:
            stay = {id(settlement) for settlement, _ in failed}
            ours = [s for s in ours if id(s) not in stay]
        with self._guarded():
            link = self._connected()
            rejected = {s.delivery.receipt.tag for s in ours if self._goes_back(s)}
            self._ack(link, {s.delivery.receipt.tag for s in ours} - rejected)
            if rejected:
                self._give_back(link, rejected)
        for settlement in ours:
            self._held_of[settlement.delivery.queue] -= 1
        return Settling(late, failed)

    def _publish_copies(self, copies: Sequence[tuple[Settlement, Publication]]) -> list[Error | None]:
        """Publish what takes the place of deliveries, and once more what can be helped."""
        errors = self._publish([copy for _, copy in copies])
        again: dict[int, Publication] = {}
        declared: dict[str, Error | None] = {}
        for index, (settlement, copy) in enumerate(copies):
            error, queue = errors[index], settlement.delivery.queue
            reason = None if error is None else error.details.get("reason")
            if reason == "unroutable":
                if queue not in declared:
                    declared[queue] = self._declared(self._specs[queue])
                if declared[queue] is None:
                    again[index] = copy
            elif reason == "full" and copy.delay <= 0 and copy.queue.id == queue:
                # It would wait for room that only its own acknowledgement makes, if no one else consumes.
                again[index] = Publication(copy.queue, copy.envelope, _ASIDE)
        if again:
            for index, error in zip(again, self._publish(list(again.values())), strict=True):
                errors[index] = error
        return errors

    def _declared(self, queue: QueueSpec) -> Error | None:
        try:
            self._declare(queue)
        except Error as error:
            return error
        return None

    def due_in(self) -> float | None:
        """See `Feed.due_in`; other workers' delays and deliveries are unknown to RabbitMQ's clients."""
        with self._guarded():
            link = self._connected()
            # The broker's channel takes the answer to a count before what came to it earlier: a delivery may
            # have left the queue and not yet been sent. It is sent before whatever is asked next is answered.
            waiting = self._count(link) or self._count(link)
            link.drain_all()
        if waiting or any(self._buffers.values()) or self._early:
            return 0.0
        now = time()
        self._due = [at for at in self._due if at > now - _TICK]
        return max(0.02, min(self._due) - now) if self._due else None

    def _count(self, link: Link) -> int:
        return sum(link.channel.queue_declare(queue, passive=True).message_count for queue in self._specs)

    def renew(self) -> None:
        """See `Feed.renew`: the connection is the lease, and heartbeats keep it."""
        self._tick()

    def wait(self, timeout: float) -> None:
        """See `Feed.wait`."""
        # Nothing else may happen before the window may be widened: handlers can be slow.
        until = min(monotonic() + timeout, self._widen_at)
        while True:
            with self._guarded():
                link = self._connected()
                step = max(0.0, min(until - monotonic(), _TICK))
                step = 0.0 if (pending := link.pending) else step
                ready, _, _ = select.select([link.connection.sock, self._waker], [], [], step)
            self._waker.drain()
            self._tick()
            if ready or pending or monotonic() >= until:
                return

    def wake(self) -> None:
        """See `Feed.wake`."""
        self._waker.wake()

    def close(self) -> None:
        """See `Feed.close`: the broker takes back what is unsettled when the channel goes."""
        if self._closed:
            return
        self._closed = True
        self._drop_link()
        self._waker.close()

    # The link.

    def _connected(self) -> Link:
        if self._link is None:
            if self._missing:
                # One queue that somebody deleted must not keep us from the others.
                for queue in self._specs.values():
                    self._declare(queue)
                self._missing = False
            self._link = self._open_link()
            self._epoch += 1
            self._windows, self._tags = dict.fromkeys(self._specs, 0), {}
        return self._link

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        # What still arrives while the link is closed goes back to the broker: it is no delivery of ours.
        self._epoch += 1
        for delivery in self._outstanding.values():
            delivery.lost = True
        self._outstanding.clear()
        self._early.clear()
        self._held_of.clear()
        for buffer in self._buffers.values():
            buffer.clear()
        if link is not None:
            link.close()

    def _guarded(self) -> Any:
        return _Guard(self)

    def _tick(self) -> None:
        with self._guarded():
            link = self._connected()
            link.connection.heartbeat_tick()

    # The window.

    def _fit(self, link: Link, credit: int, caps: Mapping[str, int]) -> None:
        """Subscribe with a window that fits what is wanted: at once when it grows, later when it shrinks.

        A window belongs to a subscription, so a change is a new subscription. A wide one hoards what
        others could run; a narrow one has the broker wait for our answers.
        """
        wanted = {
            queue: self._power(min(credit, caps.get(queue, credit)) + self._held_of[queue]) for queue in self._specs
        }
        self._widen_at = inf
        if all(wanted[queue] <= self._windows[queue] for queue in wanted):
            now = monotonic()
            if all(wanted[queue] * 4 > self._windows[queue] for queue in wanted):
                self._narrow_since = None
                return
            self._narrow_since = self._narrow_since or now
            if now - self._narrow_since < _NARROW_AFTER:
                return
        elif monotonic() - self._changed_at < _WIDEN_EVERY:
            self._widen_at = self._changed_at + _WIDEN_EVERY
            return
        self._narrow_since = None
        self._subscribe(link, wanted)

    def _power(self, wanted: int) -> int:
        if wanted <= 0:
            return 0
        window = 1
        while window < wanted:
            window *= 2
        return min(window, self._prefetch)

    def _subscribe(self, link: Link, windows: Mapping[str, int]) -> None:
        channel = link.channel
        self._changed_at = monotonic()
        for queue, window in windows.items():
            if self._windows.get(queue) == window:
                continue
            if queue in self._tags:
                channel.basic_cancel(self._tags.pop(queue))
            self._windows[queue] = window
            if not window:
                continue
            # A tag is never used twice: RabbitMQ 3.10 closes a channel whose quorum queue consumer comes
            # back under an old one while messages of it are unsettled.
            self._subscribed += 1
            self._tags[queue] = f"kq-{self._subscribed}"
            channel.basic_qos(0, window, False)
            channel.basic_consume(
                queue,
                consumer_tag=self._tags[queue],
                callback=self._receiver(queue),
                on_cancel=self._cancelled,
            )

    def _cancelled(self, tag: str) -> None:
        self._missing = True
        raise amqp.exceptions.RecoverableConnectionError(f"RabbitMQ cancelled the consumer {tag}: its queue is gone")

    def _receiver(self, queue: str) -> Callable[[Any], None]:
        epoch = self._epoch
        # Whoever looks into a queue is counted by the broker as one more delivery that nobody settled; and
        # into the dead letters, people do look.
        counted = self._specs[queue].dead_letter is not None

        def receive(message: Any) -> None:
            if epoch != self._epoch:
                return
            envelope = to_envelope(message)
            headers = envelope.headers
            redelivered = bool(message.delivery_info.get("redelivered"))
            envelope.headers = without_history(headers)
            attempts, crashes = counters(headers)
            delivery = Delivery(
                queue,
                envelope.id,
                _pack(envelope),
                read_count(headers, attempts),
                read_count(headers, crashes),
                # Only a redelivery has been counted by the broker; on a first one it is a publisher's word.
                read_count(headers, "x-delivery-count") if redelivered and counted else 0,
                _Receipt(epoch, message.delivery_tag, message),
            )
            self._outstanding[message.delivery_tag] = delivery
            if due_in(headers) > _DUE:
                self._early.append(delivery)
            else:
                self._buffers[queue].append(delivery)

        return receive

    # Settling.

    def _is_ours(self, delivery: Delivery) -> bool:
        receipt: _Receipt = delivery.receipt
        return receipt.epoch == self._epoch and receipt.tag in self._outstanding

    def _goes_back(self, settlement: Settlement) -> bool:
        delivery = settlement.delivery
        return settlement.outcome.action == "release" and not delivery.receipt.copied and not self._counted(delivery)

    def _counted(self, delivery: Delivery) -> bool:
        """Tell whether going back once more would look to the broker like yet another dead worker.

        RabbitMQ counts every return. A fresh copy starts at nought.
        """
        return delivery.deliveries > 0

    def _copy(self, settlement: Settlement) -> Publication | None:
        """Return the message that takes a delivery's place, or None where there is none."""
        delivery, outcome = settlement.delivery, settlement.outcome
        if outcome.action == "done" or self._goes_back(settlement):
            return None
        spec = self._specs[delivery.queue]
        envelope = to_envelope(delivery.receipt.message)
        envelope.id = delivery.id
        if outcome.action == "dead" and spec.dead_letter is not None:
            letter = bury(envelope, delivery.queue, outcome, time())
            return Publication(QueueSpec(spec.dead_letter), letter)
        headers = {key: value for key, value in envelope.headers.items() if key != "x_due_at"}
        delay = 0.0
        if outcome.action != "release":
            headers.update(zip(counters(headers), (outcome.attempts, outcome.crashes), strict=True))
            # A dead-letter queue has none of its own: what fails there stays, and rests for a while.
            delay = outcome.delay if outcome.action == "retry" else spec.policy.backoff.max
        if delay > 0:
            headers["x_due_at"] = time() + delay
        return Publication(spec, Envelope(envelope.id, headers, envelope.properties, envelope.body), delay)

    def _ack(self, link: Link, tags: set[int]) -> None:
        """Acknowledge, with as few frames as the order allows."""
        last = 0
        for tag in list(self._outstanding):
            if tag not in tags:
                break
            del self._outstanding[tag]
            tags.discard(tag)
            last = tag
        if last:
            # Everything up to here is settled: one frame for all.
            link.channel.basic_ack(last, multiple=True)
        for tag in tags:
            link.channel.basic_ack(tag)
            self._outstanding.pop(tag, None)

    def _give_back(self, link: Link, tags: set[int]) -> None:
        """Reject deliveries in order, and with them what waits here behind them.

        Unsubscribed first: else the broker would push them right back, behind what it pushed before.
        """
        self._subscribe(link, dict.fromkeys(self._specs, 0))
        self._changed_at = 0.0
        for buffer in self._buffers.values():
            tags.update(delivery.receipt.tag for delivery in buffer)
            buffer.clear()
        for tag in sorted(tags):
            link.channel.basic_reject(tag, requeue=True)
            self._outstanding.pop(tag, None)

    def _send_on_early(self) -> None:
        """Send on what came back from a delay's step before its time."""
        if not self._early:
            return
        early, self._early = self._early, []
        copies = []
        for delivery in early:
            envelope = to_envelope(delivery.receipt.message)
            envelope.id = delivery.id
            copies.append(Publication(self._specs[delivery.queue], envelope, max(0.0, due_in(envelope.headers))))
        results = self._publish(copies)
        with self._guarded():
            link = self._connected()
            sent = set()
            for delivery, error in zip(early, results, strict=True):
                if not self._is_ours(delivery):
                    continue
                if error is None:
                    sent.add(delivery.receipt.tag)
                    self._due.append(float(delivery.receipt.message.properties["application_headers"]["x_due_at"]))
                else:
                    self._early.append(delivery)
            self._ack(link, sent)


class _Guard:
    """Drops the link after any error, and turns the error into ours."""

    def __init__(self, feed: RabbitFeed) -> None:
        self._feed = feed
        self._mapped = mapped(feed._url)

    def __enter__(self) -> None:
        self._mapped.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if isinstance(error, (amqp.exceptions.NotFound, NotFound)):
            self._feed._missing = True
        if isinstance(error, Exception):
            self._feed._drop_link()
        return self._mapped.__exit__(kind, error, trace)


def _pack(envelope: Envelope) -> bytes:
    try:
        return pack(envelope)
    except (TypeError, ValueError, OverflowError, RecursionError):
        # A stranger's headers may hold what msgpack has no type for.
        envelope.headers = {key: _plain(value) for key, value in envelope.headers.items()}
        return pack(envelope)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) or value is None else repr(value)
