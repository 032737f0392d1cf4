"""A message's way in: unpacked, not too large, trusted, not expired, with a handler, decoded; or refused for a reason.

Workers and pullers admit messages by the same rules, in this order, so that nothing is parsed before it is
known to be small and, where that is asked for, to be signed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kq import clock, codec, outcome
from kq.backend import QueueSpec
from kq.envelope import Envelope, unpack
from kq.outcome import EXPIRED, NO_HANDLER, UNDECODABLE, UNVERIFIED, Outcome
from kq.router import Consumer, Router

#: Says why a message is not to be trusted, or nothing: ``(queue, envelope, replayed) -> why``.
Distrust = Callable[[QueueSpec, Envelope, bool], str]


class Refused(Exception):
    """A message that must not run.

    Attributes:
        reason: For the dead letter, e.g. ``undecodable``.
        why: For people.
    """

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(reason, why)
        self.reason = reason
        self.why = why

    def outcome(self, attempts: int, crashes: int) -> Outcome:
        """Return the end of the delivery, which is charged no attempt.

        Args:
            attempts: Charged before.
            crashes: Likewise.
        """
        return outcome.refused(self.reason, self.why, attempts=attempts, crashes=crashes)


class Admission:
    """The rules of one app. Thread-safe.

    Args:
        max_body: Bytes of the largest body.
        distrust: Who says whether messages of queues that ask for signatures can be trusted.
        router: Who handles what; whoever pulls has none, and handles everything.
    """

    def __init__(self, max_body: int, distrust: Distrust | None, router: Router | None = None) -> None:
        self._max_body = max_body
        self._distrust = distrust
        self._router = Router() if router is None else router

    def refusal(self, spec: QueueSpec, raw: bytes, replayed: bool) -> Refused | None:
        """Say why a message must not run, or nothing; for who has to know before it is handed to a handler."""
        try:
            envelope = self.open(spec, raw, replayed)
            self.route(spec.id, envelope)
            self.decode(spec, envelope)
        except Refused as refused:
            return refused
        return None

    def open(self, spec: QueueSpec, raw: bytes, replayed: bool) -> Envelope:
        """Return the envelope of a message, whose body is still as it arrived.

        Args:
            spec: The queue that delivered it.
            raw: What it delivered.
            replayed: Whether a message of its id has been completed before.

        Raises:
            Refused: If it is no envelope, expired, too large or not to be trusted.
        """
        try:
            envelope = unpack(raw)
        except ValueError as error:
            raise Refused(UNDECODABLE, str(error)) from None
        if len(envelope.body) > self._max_body:
            size = f"the body has {len(envelope.body):,} bytes, the limit is {self._max_body:,}"
            raise Refused(UNDECODABLE, size)
        if spec.require_signature:
            # Without keys nothing can be trusted.
            why = "there are no keys to verify it with" if self._distrust is None else self._distrust(
                spec, envelope, replayed
            )  # fmt: skip
            if why:
                raise Refused(UNVERIFIED, why)
        at = envelope.headers.get("x_expires_at")
        if isinstance(at, (int, float)) and not isinstance(at, bool):
            late = clock.now() - at
            if late >= 0:
                raise Refused(EXPIRED, f"expired {late:.1f} s before a worker came to it")
        return envelope

    def route(self, queue_id: str, envelope: Envelope, index: int = 0) -> Consumer:
        """Return the consumer that handles a message.

        Args:
            queue_id: The queue that delivered it.
            envelope: The message.
            index: Which of the queue's consumers it was given to.

        Raises:
            Refused: If there is none.
        """
        task = envelope.headers.get("task")
        consumer = self._router.resolve(queue_id, task, index)
        if consumer is None:
            what = f"the task {task!r}" if task is not None else "its messages"
            raise Refused(NO_HANDLER, f"no handler for {what} on queue {queue_id} in this worker")
        return consumer

    def decode(self, spec: QueueSpec, envelope: Envelope) -> Any:
        """Return the payload of an envelope.

        Raises:
            Refused: If it cannot be decoded.
        """
        properties = envelope.properties
        try:
            return codec.decode(
                envelope.body,
                properties.get("content_type"),
                properties.get("content_encoding"),
                codec.named(spec.codec),
            )
        except codec.Undecodable as error:
            raise Refused(UNDECODABLE, str(error)) from None
