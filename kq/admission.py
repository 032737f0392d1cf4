"""A message's way in: unpacked, not expired, not too large, trusted, decoded; or refused for a reason.

Workers and pullers admit messages by the same rules, in this order, so that nothing is parsed before it is
known to be small and, where that is asked for, to be signed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kq import clock, codec
from kq.backend import QueueSpec
from kq.envelope import Envelope, unpack
from kq.errors import INVALID
from kq.outcome import EXPIRED, MAX_MESSAGE, UNDECODABLE, UNVERIFIED, Failure, Outcome, clip

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
        failure = Failure(INVALID, clip(self.why, MAX_MESSAGE), False)
        return Outcome("dead", 0.0, attempts, crashes, self.reason, failure)


class Admission:
    """The rules of one app. Thread-safe.

    Args:
        max_body: Bytes of the largest body.
        distrust: Who says whether messages of queues that ask for signatures can be trusted.
    """

    def __init__(self, max_body: int, distrust: Distrust | None) -> None:
        self._max_body = max_body
        self._distrust = distrust

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
        at = envelope.headers.get("x_expires_at")
        if isinstance(at, (int, float)) and not isinstance(at, bool):
            late = clock.now() - at
            if late >= 0:
                raise Refused(EXPIRED, f"expired {late:.1f} s before a worker came to it")
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
        return envelope

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
