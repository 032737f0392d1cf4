"""What takes the place of deliveries from RabbitMQ: retries, dead letters, and what goes back or on with its counts.

A copy is confirmed before what it stands for is acknowledged: both exist for a moment, never neither. One that a
blocked connection may still hold is waited for, not made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from kq import clock
from kq.backend import Delivery, Publication, QueueSpec
from kq.backends.rabbitmq_receipt import Receipt, envelope_of
from kq.backends.rabbitmq_sender import Courier
from kq.backends.rabbitmq_topology import DELAY_LEFT, counters, due_in, without_strangers
from kq.envelope import DELIVERIES, Envelope, bury
from kq.errors import Error
from kq.outcome import Outcome

#: Seconds that a message waits outside a full queue before it comes back to it. Where there is no room then either,
#: RabbitMQ does not try again for three minutes (its `dead_letter_worker_publisher_confirm_timeout`).
_ASIDE: Final = 1.0


class Copies:
    """Publishes what takes the place of deliveries. One thread's.

    Args:
        courier: Publishes with confirms.
        specs: The queues of the deliveries, by id.
        declared: Makes a queue and its dead-letter queue where they are missing; returns why that cannot be.
    """

    def __init__(
        self, courier: Courier, specs: Mapping[str, QueueSpec], declared: Callable[[QueueSpec], Error | None]
    ) -> None:
        self._courier = courier
        self._specs = specs
        self._declared = declared

    def publish(self, wanted: Sequence[tuple[Delivery, Outcome | None]]) -> list[Error | None]:
        """Publish what takes the place of deliveries, each for itself, and once more what can be helped.

        Args:
            wanted: Deliveries, each with its outcome; None for what goes on as it is, with its counts.

        Returns:
            For each None if it is stored, which its receipt says from then on; else why not.
        """
        copies = [self._on_its_way(delivery, outcome) or self._made(delivery, outcome) for delivery, outcome in wanted]
        errors = self._courier.publish(copies)
        again: dict[int, Publication] = {}
        declared: dict[str, Error | None] = {}
        for index, (delivery, _) in enumerate(wanted):
            queue, copy, error = delivery.queue, copies[index], errors[index]
            reason = None if error is None else error.details.get("reason")
            if reason == "unroutable":
                if queue not in declared:
                    declared[queue] = self._declared(self._specs[queue])
                if declared[queue] is None:
                    again[index] = copy
            elif error is not None and "headers" in error.details:
                # With headers that RabbitMQ did take, and ours beside them.
                again[index] = Publication(copy.queue, without_strangers(copy.envelope), copy.delay)
            elif reason == "full" and copy.delay <= 0 and copy.queue.id == queue:
                # It would wait for room that only its own acknowledgement makes, if no one else consumes.
                again[index] = Publication(copy.queue, copy.envelope, _ASIDE)
        if again:
            for index, error in zip(again, self._courier.publish(list(again.values())), strict=True):
                copies[index], errors[index] = again[index], error
        for (delivery, outcome), copy, error in zip(wanted, copies, errors, strict=True):
            if error is None:
                delivery.receipt.copied = True
            else:
                self._note_way(delivery, outcome, copy)
        return errors

    def go_on(self, delivery: Delivery) -> bool:
        """Have what may be on its way for a delivery stand for what goes on as it is; False if there is nothing.

        As far as we are concerned it has been sent on: who ran the delivery now would run it twice.
        """
        receipt: Receipt = delivery.receipt
        if receipt.copy is None:
            return False
        self._note_way(delivery, None, receipt.copy[1])
        return receipt.copy is not None

    def forget(self, delivery: Delivery) -> None:
        """Wait no more for what may be on its way for a delivery, which is lost."""
        receipt: Receipt = delivery.receipt
        if receipt.copy is not None:
            self._courier.forget(receipt.copy[1])

    def wait(self, timeout: float) -> None:
        """Wait so many seconds for the broker to say something of what is on its way."""
        self._courier.wait(timeout)

    def close(self) -> None:
        """Give up what is on its way."""
        self._courier.close()

    def _on_its_way(self, delivery: Delivery, outcome: Outcome | None) -> Publication | None:
        """Return what the courier may still have on its way to take a delivery's place: it is not to be made anew."""
        receipt: Receipt = delivery.receipt
        return receipt.copy[1] if receipt.copy is not None and receipt.copy[0] == outcome else None

    def _note_way(self, delivery: Delivery, outcome: Outcome | None, copy: Publication) -> None:
        receipt: Receipt = delivery.receipt
        if receipt.copy is not None and receipt.copy[1] is not copy:
            self._courier.forget(receipt.copy[1])
        receipt.copy = (outcome, copy) if self._courier.holds(copy) else None

    def _made(self, delivery: Delivery, outcome: Outcome | None) -> Publication:
        spec, envelope = self._specs[delivery.queue], envelope_of(delivery)
        if outcome is None:
            if delivery.deliveries:
                envelope.headers[DELIVERIES] = delivery.deliveries
            return Publication(spec, envelope, max(0.0, due_in(envelope.headers)))
        if outcome.action == "dead" and spec.dead_letter is not None:
            return Publication(QueueSpec(spec.dead_letter), bury(envelope, delivery.queue, outcome, clock.now()))
        headers = {
            key: value for key, value in envelope.headers.items() if key not in ("x_due_at", DELAY_LEFT, DELIVERIES)
        }
        delay = 0.0
        if outcome.action == "release":
            if outcome.deliveries:
                headers[DELIVERIES] = outcome.deliveries
        else:
            headers.update(zip(counters(headers), (outcome.attempts, outcome.crashes), strict=True))
            # A dead-letter queue has none of its own: what fails there stays, and rests for a while.
            delay = outcome.delay if outcome.action == "retry" else spec.policy.backoff.max
        if delay > 0:
            headers["x_due_at"] = clock.now() + delay
        return Publication(spec, Envelope(envelope.id, headers, envelope.properties, envelope.body), delay)
