"""Pulling messages in a program of your own, without a worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from math import inf
from queue import Empty, Queue
from threading import Condition, RLock
from time import monotonic
from typing import Any

from kq import errors, limit
from kq.admission import Admission, Refused
from kq.backend import Backend, Delivery, QueueSpec, Settlement
from kq.driver import naming
from kq.errors import Internal, Invalid
from kq.fetcher import Fetcher
from kq.intake import Intake
from kq.message import Message, Settled
from kq.outcome import DONE, Failure, Outcome, given_up
from kq.registry import HasRegistry, registry_of
from kq.retry import after_failure

#: Seconds that closing waits for the broker.
_CLOSE_TIMEOUT = 10.0
#: Seconds after which whoever waits looks whether a signal's handler has closed the consumer, which may wake nobody.
_GLANCE = 1.0


class PulledMessage(Message):
    """A message that the program settles itself: ``ack()`` or ``nack()``, in its own time."""

    __slots__ = ("_payload",)

    def __init__(self, payload: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._payload = payload

    def release(self) -> None:
        """See `Message.release`; what is being settled is settled first."""
        with self._lock:
            super().release()

    def payload(self) -> Any:
        """Return what was published."""
        self._live()
        return self._payload

    def _settle(self, how: Settled, delay: float | None) -> None:
        with self._lock:
            super()._settle(how, delay)
            if self._released:
                raise Invalid(
                    "the consumer was closed, by a signal's handler, while this was settled; it may come again"
                )


class _Arrivals(Queue["Delivery | None"]):
    """What has arrived, in order.

    A signal's handler may close the consumer in the middle of a call. A `SimpleQueue` would allow that as well, but
    up to Python 3.11 it may wait for ever where the time is over already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mutex = RLock()  # type: ignore[assignment]
        self.not_empty = Condition(self.mutex)
        self.not_full = Condition(self.mutex)
        self.all_tasks_done = Condition(self.mutex)


class Consumer:
    """Receives messages one by one. Leases are renewed while it is open; closing releases the rest.

    Thread-safe: several threads may receive from one consumer.

    Args:
        app_or_url: An app, or a broker URL.
        queue_ids: One queue id, or several.
        prefetch: Messages to hold beforehand; where the queues live on several brokers, these share them.

    Raises:
        Invalid: If a queue id is ill-formed or ``prefetch`` is no positive number.
        PermissionDenied: If a policy says no.
        Internal: If the broker cannot be reached.
    """

    def __init__(self, app_or_url: HasRegistry | str, queue_ids: str | Sequence[str], *, prefetch: int = 10) -> None:
        if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 1:
            raise Invalid(f"prefetch: expected an integer from 1, got {prefetch!r}")
        if not isinstance(queue_ids, Iterable):
            raise Invalid(f"queue_ids: expected a queue id or a list of them, got {type(queue_ids).__name__}")
        ids = [queue_ids] if isinstance(queue_ids, str) else list(queue_ids)
        if not ids:
            raise Invalid("queue_ids: expected at least one queue id")
        self._registry, _ = registry_of(app_or_url)
        self._specs: dict[str, QueueSpec] = {
            limit.queue_id(queue_id): self._registry.spec(queue_id) for queue_id in ids
        }
        for queue_id in self._specs:
            self._registry.guard.consume(queue_id)
        self._admission = Admission(self._registry.settings.max_body, self._registry.distrust)
        self._prefetch = prefetch
        self._closed = False
        #: What has arrived; None, for ever, once it is closed.
        self._ready = _Arrivals()
        #: What was received and is not settled.
        self._received: dict[int, PulledMessage] = {}
        with ExitStack() as stack:
            backends: dict[str, Backend] = {}
            for spec in self._specs.values():
                if spec.driver not in backends:
                    backends[spec.driver] = self._registry.open(spec.driver)
                    stack.callback(backends[spec.driver].close)
                exact = self._registry.is_exact(spec.id)
                create = self._registry.create_queues or self._registry.is_declared(spec.id)
                with naming(spec.driver):
                    backends[spec.driver].declare(spec, create=create, exact=exact)
            self._backends = stack.pop_all()
        fetchers = {name: self._fetcher(name, backend) for name, backend in backends.items()}
        self._intake = Intake({spec.id: fetchers[spec.driver] for spec in self._specs.values()})
        self._intake.hold(prefetch)
        try:
            self._intake.start()
        except BaseException as error:
            # There is no thread for one of them: the others are not to go on for nobody.
            self._intake.stop(_CLOSE_TIMEOUT)
            self._backends.close()
            if isinstance(error, (RuntimeError, MemoryError)):
                text = f"no thread to receive with: {error}"
                raise Internal(text, details={"reason": "unavailable"}) from None
            raise

    def _fetcher(self, driver: str, backend: Backend) -> Fetcher:
        return Fetcher(
            backend,
            [spec for spec in self._specs.values() if spec.driver == driver],
            driver=self._registry.driver(driver),
            prefetch=self._prefetch,
            lease=self._registry.settings.lease,
            on_deliveries=self._arrived,
        )

    def receive(self, timeout: float | timedelta | None = None) -> PulledMessage | None:
        """Return the next message, or None after ``timeout``, seconds or a ``timedelta`` (None: for ever).

        Messages that expired or cannot be decoded go to the dead-letter queue on the way, and so do those that
        ``max_deliveries`` in a row have left unsettled, for whoever held them died.

        Raises:
            Invalid: If the consumer is closed, or another thread closes it meanwhile.
        """
        if isinstance(timeout, timedelta):
            timeout = timeout.total_seconds()
        if isinstance(timeout, (int, float)) and timeout < 0:
            # What is left of a time that is over.
            timeout = 0.0
        seconds = None if timeout is None else limit.seconds("timeout", timeout, maximum=inf)
        deadline = None if seconds is None else monotonic() + min(seconds, limit.MAX_DELAY)
        while True:
            left = inf if deadline is None else max(0.0, deadline - monotonic())
            try:
                delivery = self._ready.get(timeout=min(left, _GLANCE))
            except Empty:
                if left > _GLANCE and not self._closed:
                    continue
                if not self._closed:
                    return None
                delivery = None
            if delivery is None or self._closed:
                # For whoever else waits, or comes later.
                self._ready.put(None)
                raise Invalid("the consumer is closed; make another one to receive more")
            if delivery.lost:
                # It waited here too long, or the connection broke: it is given out again.
                self._intake.finished(delivery.queue)
                continue
            try:
                opened = self._open(delivery)
            except BaseException:
                # Interrupted, by a signal's handler: nobody has it.
                self._settle(delivery, delivery.as_it_came)
                raise
            if isinstance(opened, Outcome):
                self._settle(delivery, opened)
                continue
            self._received[id(opened)] = opened
            if self._closed:
                opened.release()
            return opened

    def __iter__(self) -> Iterator[PulledMessage]:
        """Iterate over messages, until the consumer is closed."""
        while not self._closed:
            try:
                message = self.receive()
            except Invalid:
                if self._closed:
                    return
                raise
            if message is not None:
                yield message

    def close(self) -> None:
        """Settle what was settled, release the rest, and disconnect. Idempotent.

        A message that was received and not settled is nobody's from here on: each of its methods raises ``Invalid``.
        """
        self._closed = True
        self._ready.put(None)
        for message in list(self._received.values()):
            message.release()
        self._intake.stop(_CLOSE_TIMEOUT)
        self._backends.close()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _arrived(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._ready.put(delivery)
        self._intake.hold(self._prefetch)

    def _open(self, delivery: Delivery) -> PulledMessage | Outcome:
        """Return a delivery as a message, or what to settle it with where nobody is to see it."""
        spec = self._specs[delivery.queue]
        if delivery.refused is not None:
            return delivery.refused
        if delivery.deliveries >= self._registry.settings.max_deliveries:
            return given_up(delivery.deliveries, attempts=delivery.attempts, crashes=delivery.crashes)
        try:
            envelope = self._admission.open(spec, delivery.raw, delivery.replayed)
            payload = self._admission.decode(spec, envelope)
        except Refused as refused:
            return refused.outcome(delivery.attempts, delivery.crashes)

        def settle(how: Settled, delay: float | None) -> None:
            self._settle(delivery, outcome(how, delay))
            # Last: whoever closes the consumer before that, in a signal's handler, says so to whoever settles it.
            self._received.pop(id(message), None)

        def outcome(how: Settled, delay: float | None) -> Outcome:
            if how is Settled.ACK:
                return DONE
            failure = Failure(errors.INTERNAL, "the receiver called nack()", True)
            attempts = delivery.attempts + 1
            return after_failure(failure, spec.policy, attempts=attempts, crashes=delivery.crashes, delay=delay)

        message = PulledMessage(
            payload,
            envelope,
            queue=delivery.queue,
            attempt=delivery.attempts + 1,
            crashes=delivery.crashes,
            on_settle=settle,
        )
        return message

    def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        self._intake.settle([Settlement(delivery, outcome)])
        self._intake.finished(delivery.queue)
        self._intake.hold(self._prefetch)
