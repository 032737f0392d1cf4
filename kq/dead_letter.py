"""Messages that could not be handled: look at them, send them back, or drop them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from kq import codec
from kq.backend import Backend
from kq.envelope import Envelope
from kq.errors import NotFound
from kq.limit import count
from kq.registry import Registry
from kq.shield import shielded


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not be handled.

    Attributes:
        id: The message's id.
        queue_id: The queue it came from.
        payload: What was published, or None where it cannot be decoded.
        body: The encoded payload as it arrived.
        headers: The publisher's, without kq's own.
        reason: ``max_attempts``, ``not_retryable``, ``crash_loop``, ``expired``, ``undecodable``,
            ``unverified``, ``no_handler``, or the broker's own word.
        attempts: How often a handler ran.
        error_kind: The kind of the last error, or None.
        error_message: Its message, or None.
        dead_at: When it died; None where nobody wrote that down.
        crashes: How often a process died under its handler.
        exit_code: What the last of these processes exited with, or None.
        exit_signal: The number of the signal that killed it, or None.
        peak_memory: Bytes of memory that it occupied at most, or None.
        error_traceback: Where the last error was raised, the last 4 KiB of it; or None.
    """

    id: str
    queue_id: str
    payload: Any
    body: bytes
    headers: dict[str, Any]
    reason: str
    attempts: int
    error_kind: str | None
    error_message: str | None
    dead_at: datetime | None
    crashes: int = 0
    exit_code: int | None = None
    exit_signal: int | None = None
    peak_memory: int | None = None
    error_traceback: str | None = None


class DeadLetters:
    """The dead-letter queue of a queue: look, replay, purge.

    Several queues may share one dead-letter queue; `list`, `get` and `purge` see all that is in it,
    `replay` takes only what came from this queue. Every call raises ``PermissionDenied`` where a policy does not
    allow ``queue.admin.queue`` on the queue.
    """

    def __init__(self, registry: Registry, queue_id: str) -> None:
        self._registry = registry
        self._origin = registry.spec(queue_id)
        self._queue = registry.dead_letters_of(queue_id)

    def list(self, limit: int = 100, offset: int = 0) -> list[DeadLetter]:
        """Return dead letters, oldest first, and leave them where they are.

        Args:
            limit: How many at most.
            offset: How many to pass over.
        """
        count("limit", limit, 1, 1_000_000)
        count("offset", offset, 0, 2**31 - 1)
        with self._administering() as backend:
            letters = backend.browse(self._queue, limit, offset)
        return [self._open(envelope) for envelope in letters]

    def get(self, message_id: str) -> DeadLetter:
        """Return one dead letter.

        Raises:
            NotFound: If there is none of that id.
        """
        with self._administering() as backend:
            id = str(message_id)
            letter = backend.find(self._queue, id) if _is_utf8(id) else None
        if letter is None:
            raise NotFound(f"no dead letter {message_id!r} in {self._queue.id}")
        return self._open(letter)

    def replay(self, ids: Iterable[str] | None = None) -> int:
        """Send dead letters back to their queue, as new messages under their old ids.

        Args:
            ids: Which; None for all.

        Returns:
            How many there were.
        """
        with self._administering() as backend:
            self._registry.ensure(self._origin)
            return backend.replay(
                self._queue, _ids(ids), self._origin, lambda letter: self._registry.revive(self._origin, letter)
            )

    def purge(self, ids: Iterable[str] | None = None) -> int:
        """Drop dead letters for good, and return how many there were.

        Args:
            ids: Which; None for all.
        """
        with self._administering() as backend:
            return backend.remove(self._queue, _ids(ids))

    @contextmanager
    def _administering(self) -> Iterator[Backend]:
        """Give the broker that has both queues, once it is known that this is allowed and that there are any letters.

        A time limit does not strike meanwhile: it would leave a broken connection behind, for everybody.
        """
        self._registry.guard.administer(self._origin.id)
        with shielded():
            self._registry.ensure_declared(self._origin)
            backend = self._registry.backend(self._queue.driver)
            try:
                backend.info(self._queue)
            except NotFound:
                raise NotFound(
                    f"queue {self._origin.id} has no dead letters on this broker: its queue, {self._queue.id}, "
                    "is not there; a publisher or a worker makes it. Check the queue id and the broker's URL"
                ) from None
            yield backend

    def _open(self, envelope: Envelope) -> DeadLetter:
        headers = envelope.headers
        properties = envelope.properties
        payload = None
        # What was too large for a worker to parse is so for whoever looks at it.
        if len(envelope.body) <= self._registry.settings.max_body:
            with suppress(codec.Undecodable):
                payload = codec.decode(
                    envelope.body,
                    properties.get("content_type"),
                    properties.get("content_encoding"),
                    codec.named(self._origin.codec),
                )
        return DeadLetter(
            id=envelope.id,
            queue_id=str(headers.get("x_original_queue", self._origin.id)),
            payload=payload,
            body=envelope.body,
            headers={key: value for key, value in headers.items() if not key.startswith("x_")},
            reason=str(headers.get("x_dead_letter_reason", "rejected")),
            attempts=_integer(headers.get("x_attempts")) or 0,
            error_kind=_text(headers.get("x_error_kind")),
            error_message=_text(headers.get("x_error_message")),
            dead_at=_moment(headers.get("x_dead_letter_time")),
            crashes=_integer(headers.get("x_crashes")) or 0,
            exit_code=_integer(headers.get("x_exit_code")),
            exit_signal=_integer(headers.get("x_exit_signal")),
            peak_memory=_integer(headers.get("x_peak_memory")),
            error_traceback=_text(headers.get("x_error_traceback")),
        )


# Anybody may have written these headers.


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _moment(value: Any) -> datetime | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # No year that there is, or no number.
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(value, timezone.utc)
    return None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ids(ids: Iterable[str] | None) -> list[str] | None:
    if ids is None:
        return None
    return [id for id in map(str, [ids] if isinstance(ids, str) else ids) if _is_utf8(id)]


def _is_utf8(text: str) -> bool:
    """Tell whether a broker can be asked for it; a command line may bring other bytes, which no id has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
