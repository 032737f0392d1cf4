"""What kq declares on RabbitMQ, by which names, and how messages look there.

For a queue ``app:emails``:

==========================  ========================================================================
queue ``app:emails``        quorum (classic where ``max_priority`` is set); rejected messages go to
exchange
  ``app:emails.dead``       fanout, bound to
queue ``app:emails.dead``   quorum, the dead letters; they come back in order to where they were when somebody
                            has looked at them, which takes a limit of deliveries
==========================  ========================================================================

And for delays, shared by all queues, made when first needed:

==========================  ========================================================================
exchange ``kq.delay.<ms>``  fanout, so that the routing key is kept; bound to
queue ``kq.delay.<ms>``     quorum; its messages expire after ``<ms>`` and return through the default
                            exchange to the queue that their routing key names
==========================  ========================================================================

All messages of a bucket wait equally long, so none blocks another. A delay that is no bucket's is
walked in steps, the longest first: whoever consumes the queue sends on what comes back before its
``x_due_at``.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, Final

import amqp

from kq import clock
from kq.backend import QueueSpec, unknown_options
from kq.backends.rabbitmq_frame import legible
from kq.envelope import COUNTERS, DEAD_COUNTERS, DEAD_EXPIRY, DELIVERIES, Envelope
from kq.errors import Invalid
from kq.limit import MAX_DELAY

_OPTIONS: Final = frozenset({"queue_type", "arguments"})

#: The argument of a queue that is a limit of deliveries.
DELIVERY_LIMIT: Final = "x-delivery-limit"

#: How often messages can be given back, and dead letters looked at: for ever. A quorum queue puts what is given back
#: where it was only if it has a limit of deliveries, else behind all others; and from version 4 on one that says
#: nothing has a limit of 20, after which it takes the message out
#: (https://www.rabbitmq.com/docs/quorum-queues#repeated-requeues).
_FOR_EVER: Final = 10**9

#: Milliseconds of the buckets: ten a decade, round, from 10 ms to a year.
BUCKETS: Final[tuple[int, ...]] = tuple(
    step * 10**decade
    for decade in range(10)
    for step in (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
    if step * 10**decade <= MAX_DELAY * 1000
)

#: The header of a message in a bucket that says how many seconds will be left after it.
DELAY_LEFT: Final = "x_delay_left"

#: The headers that kq writes, all of which fit into a frame; and bytes of the longest, which is a traceback's end.
_OURS: Final = frozenset({
    "x_kq", *COUNTERS, *DEAD_COUNTERS, DELIVERIES, "x_due_at", DELAY_LEFT, "x_expires_at", DEAD_EXPIRY, "x_sig",
    "x_original_queue", "x_dead_letter_reason", "x_dead_letter_time", "x_error_kind", "x_error_message",
    "x_error_traceback", "x_exit_code", "x_exit_signal", "x_peak_memory",
})  # fmt: skip
_LONG_HEADER: Final = 5_000

#: A message may come this much later than asked, as a part of its delay, to save a step...
_LATE_PART: Final = 0.02
#: ...but never by more milliseconds than this.
_LATE_MOST: Final = 250

# Headers by which RabbitMQ tells a message's history. Sent on, they would be taken for a loop.
_HISTORY: Final = frozenset({"x-death", "x-delivery-count", "x-acquired-count"})
_HISTORY_PREFIXES: Final = ("x-first-death-", "x-last-death-")

#: AMQP's basic properties, but for the headers.
PROPERTIES: Final = (
    "content_type", "content_encoding", "delivery_mode", "priority", "correlation_id", "reply_to", "message_id",
    "timestamp", "type", "user_id", "app_id",
)  # fmt: skip


def is_classic(queue: QueueSpec) -> bool:
    """Tell whether a queue is a classic one: with priorities, or because its options say so."""
    kind = queue.options.get("amqp", {}).get("queue_type", "classic" if queue.max_priority else "quorum")
    return bool(kind == "classic")


def queue_arguments(queue: QueueSpec) -> dict[str, Any]:
    """Return the arguments a queue is declared with.

    Raises:
        Invalid: If ``options["amqp"]`` has something unknown, or asks for what cannot be.
    """
    unknown_options(queue, "amqp", _OPTIONS)
    options = queue.options.get("amqp", {})
    kind = options.get("queue_type", "quorum" if not queue.max_priority else "classic")
    if kind not in ("quorum", "classic"):
        raise Invalid(f"queue {queue.id}: options: amqp: queue_type: expected quorum or classic, got {kind!r}")
    if kind == "quorum" and queue.max_priority:
        raise Invalid(f"queue {queue.id}: a quorum queue has no priorities; leave out queue_type or max_priority")
    extra = options.get("arguments", {})
    if not isinstance(extra, Mapping):
        raise Invalid(f"queue {queue.id}: options: amqp: arguments: expected a mapping, got {extra!r}")
    arguments: dict[str, Any] = {"x-queue-type": kind}
    if kind == "quorum":
        arguments[DELIVERY_LIMIT] = _FOR_EVER
    if queue.dead_letter is not None:
        arguments["x-dead-letter-exchange"] = queue.dead_letter
        if kind == "quorum":
            # Needs reject-publish, which is what a full queue is to do anyway.
            arguments["x-dead-letter-strategy"] = "at-least-once"
            arguments["x-overflow"] = "reject-publish"
    if queue.max_length is not None:
        arguments["x-max-length"] = queue.max_length
        arguments["x-overflow"] = "reject-publish"
    if queue.max_priority:
        arguments["x-max-priority"] = queue.max_priority
    return {**arguments, **extra}


def dead_letter_arguments() -> dict[str, Any]:
    """Return the arguments of a dead-letter queue that nobody described."""
    return {"x-queue-type": "quorum", DELIVERY_LIMIT: _FOR_EVER}


def bucket_name(milliseconds: int) -> str:
    """Return the name of a bucket's exchange and queue."""
    return f"kq.delay.{milliseconds}"


def bucket_arguments(milliseconds: int) -> dict[str, Any]:
    """Return the arguments of a bucket's queue."""
    return {
        "x-queue-type": "quorum",
        "x-message-ttl": milliseconds,
        "x-dead-letter-exchange": "",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def bucket_for(remaining: float) -> int:
    """Return the bucket, in ms, for the next step of a delay.

    The smallest one that is not too short, if it is hardly too long; else the longest that is not.

    Args:
        remaining: Seconds until the message is due.
    """
    wanted = max(1, round(remaining * 1000 + 0.5))
    late = min(_LATE_MOST, max(BUCKETS[0], int(wanted * _LATE_PART)))
    above = bisect_left(BUCKETS, wanted)
    if above < len(BUCKETS) and BUCKETS[above] - wanted <= late:
        return BUCKETS[above]
    return BUCKETS[max(0, bisect_right(BUCKETS, wanted) - 1)]


def to_envelope(message: amqp.Message) -> Envelope:
    """Return what arrived as an envelope; a message without an id is given one, the same at each look."""
    found = message.properties
    properties = {
        key: legible(value) if isinstance(value, str) else value
        for key in PROPERTIES
        if (value := found.get(key)) is not None
    }
    try:
        headers = legible_table(found.get("application_headers") or {})
    except RecursionError:
        headers = {}
    id = properties.pop("message_id", None)
    body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
    return Envelope(id if isinstance(id, str) and id else id_of(headers, properties, body), headers, properties, body)


def id_of(headers: Mapping[str, Any], properties: Mapping[str, Any], body: bytes) -> str:
    """Return an id for a message that has none, of what it says: nothing else of it is the same at the next look."""
    said = repr((sorted(without_history(headers).items()), sorted(properties.items())))
    return hashlib.blake2b(said.encode("utf-8", "backslashreplace") + b"\n" + body, digest_size=16).hexdigest()


def legible_table(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Return headers with all text as UTF-8 can hold it, and with nothing that JSON has no word for."""
    return {legible(key): _legible_value(value) for key, value in table.items()}


def _legible_value(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return legible_table(value)
    if isinstance(value, list):
        return [_legible_value(item) for item in value]
    # As a handler gets them, which is in another process.
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    return value


def without_history(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return headers without what RabbitMQ says of a message's past."""
    if "x-" not in "\n".join(headers):
        # As a rule it says nothing.
        return dict(headers)
    return {
        key: value for key, value in headers.items() if key not in _HISTORY and not key.startswith(_HISTORY_PREFIXES)
    }


def without_strangers(envelope: Envelope) -> Envelope:
    """Return a message whose headers take too much with kq's own only, as short as kq writes them."""
    kept = {
        key: value for key, value in envelope.headers.items()
        if key in _OURS and (isinstance(value, (int, float))
                             or (isinstance(value, str) and len(value.encode("utf-8", "replace")) <= _LONG_HEADER))
    }  # fmt: skip
    dropped = len(envelope.headers) - len(kept)
    return Envelope(envelope.id, {**kept, "x_headers_dropped": dropped}, envelope.properties, envelope.body)


def read_count(headers: Mapping[str, Any], key: str) -> int:
    """Return a counter from headers; 0 where it is missing or makes no sense."""
    value = headers.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6 else 0


def counters(headers: Mapping[str, Any]) -> tuple[str, str]:
    """Return the headers that count a message's attempts and crashes."""
    return DEAD_COUNTERS if "x_dead_letter_reason" in headers else COUNTERS


def due_in(headers: Mapping[str, Any]) -> float:
    """Return the seconds until a delayed message is due; 0 or less if it is."""
    at = headers.get("x_due_at")
    if not isinstance(at, (int, float)) or isinstance(at, bool):
        return 0.0
    remaining = at - clock.now()
    left = headers.get(DELAY_LEFT)
    if isinstance(left, (int, float)) and not isinstance(left, bool):
        # Where the publisher's clock is ahead of ours, the steps know better how much is left.
        remaining = min(remaining, left)
    # Beyond the longest delay there is, it was not one of ours who wrote it.
    return remaining if remaining <= MAX_DELAY else 0.0


def _time_of_death(deaths: Any) -> float | None:
    """Return when RabbitMQ moved a message for the first time, in seconds of the epoch; None if it does not say."""
    try:
        at = datetime.fromisoformat(deaths[-1]["time"])
    except (TypeError, LookupError, ValueError):
        return None
    return at.timestamp() if at.tzinfo else at.replace(tzinfo=timezone.utc).timestamp()


def explain_rejection(envelope: Envelope, queue: str) -> Envelope:
    """Return a dead letter; one that RabbitMQ moved by itself says so in kq's words."""
    headers = dict(envelope.headers)
    if "x_dead_letter_reason" not in headers:
        headers["x_dead_letter_reason"] = str(headers.get("x-first-death-reason", "rejected"))
        headers["x_original_queue"] = str(headers.get("x-first-death-queue", queue))
        headers.setdefault("x_dead_letter_time", _time_of_death(headers.get("x-death")))
    return Envelope(envelope.id, without_history(headers), envelope.properties, envelope.body)
