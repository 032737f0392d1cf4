"""The limits of the wire format, and the checks that hold publishers to them.

All of this runs before a broker sees anything, so a refused message leaves no trace.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from kq.errors import Invalid

#: Bytes of an encoded body, unless the app says otherwise.
MAX_BODY: Final = 2**20
#: Bytes that ``max_body`` may be raised to.
MAX_BODY_CEILING: Final = 8 * 2**20
#: Seconds that a message can be held back.
MAX_DELAY: Final = 365 * 86400.0
#: Levels of lists and mappings in a payload.
MAX_NESTING: Final = 64

#: ``namespace:name``. A queue's name on the broker, hence no byte that a broker, a shell or a
#: Redis hash tag gives a meaning to.
QUEUE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}:[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: What comes on top of the length limit for dead-letter queues.
DEAD_SUFFIX: Final = ".dead"

#: The least and the most that a setting may be, in arguments, variables and files alike; seconds, bytes, deliveries.
RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "publish_timeout": (0.001, 3600),
    "lease": (0.1, 86400),
    "heartbeat": (1, 3600),
    "max_body": (1, MAX_BODY_CEILING),
    "max_deliveries": (1, 1_000_000),
}
#: A duration as people write it; seconds where no unit is named.
DURATION: Final = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|h|d)?$", re.ASCII)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}

_DRIVER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")
_MESSAGE_ID: Final = re.compile(r"[\x20-\x7e]{1,128}")


def is_queue_id(text: str) -> bool:
    """Tell whether a text is a queue id, be it of a queue of dead letters."""
    return bool(QUEUE_ID.fullmatch(text) or QUEUE_ID.fullmatch(text.removesuffix(DEAD_SUFFIX)))


def queue_id(value: Any) -> str:
    """Return ``value`` if it is a queue id.

    Raises:
        Invalid: If it is empty or not of the form ``namespace:name``.
    """
    if isinstance(value, str):
        if is_queue_id(value):
            return value
        if not value:
            raise Invalid('the queue id is empty; expected "namespace:name", e.g. "app:emails"')
    if callable(value):
        raise Invalid('got a function for a queue id; write @app.consumer("namespace:name") above the handler')
    raise Invalid(
        f'ill-formed queue id {_short(value)}; expected "namespace:name", e.g. "app:emails": letters, '
        "digits, '.', '_' and '-', each part starting with a letter or digit and at most 100 long"
    )


def count(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``, else raise ``Invalid``."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise Invalid(f"{name}: expected an integer from {low} to {high:,}, got {value!r}")


def functions(name: str, given: Any) -> tuple[Any, ...]:
    """Return the functions of a list, as middleware is given, or raise ``Invalid``."""
    if callable(given) or not isinstance(given, Iterable):
        raise Invalid(f"{name}: expected a list of functions, got {given!r}")
    found = tuple(given)
    for function in found:
        if not callable(function):
            raise Invalid(f"{name}: expected functions, got {function!r}")
    return found


def duration(text: str) -> float | None:
    """Return the seconds that a text such as ``5``, ``250ms``, ``10m`` or ``1d`` means; None if it means none."""
    found = DURATION.fullmatch(text.strip())
    seconds = math.inf if found is None else float(found[1]) * _UNITS[found[2]]
    # A number of hundreds of digits is infinite as a float.
    return seconds if math.isfinite(seconds) else None


def driver_name(value: Any) -> str:
    """Return ``value`` if it can be the name of a driver.

    Raises:
        Invalid: If it cannot.
    """
    if isinstance(value, str) and _DRIVER.fullmatch(value):
        return value
    raise Invalid(
        f"ill-formed driver name {_short(value)}; expected letters, digits, '.', '_', ':' and '-', starting with a "
        "letter or digit, at most 100"
    )


def message_id(value: Any) -> str:
    """Return ``value`` if it can be a message's id: 1 to 128 printable ASCII characters.

    Raises:
        Invalid: If it cannot.
    """
    if isinstance(value, str) and _MESSAGE_ID.fullmatch(value):
        return value
    raise Invalid(f"message_id: expected 1 to 128 printable ASCII characters, got {_short(value)}")


def seconds(name: str, value: Any, *, maximum: float = MAX_DELAY) -> float:
    """Return a duration as float seconds.

    Args:
        name: The argument's name, for the error.
        value: Seconds, or a ``timedelta``.
        maximum: The longest allowed, in seconds.

    Raises:
        Invalid: If it is no number, not finite, negative or too long.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Invalid(f"{name}: expected seconds or a timedelta, got {_short(value)}")
    # Compared before it is converted: an integer may be too large for a float.
    if not 0 <= value < math.inf:
        raise Invalid(f"{name}: expected a number of seconds from 0, got {_short(value)}")
    if value > maximum:
        raise Invalid(f"{name}: expected at most {maximum:,.10g} seconds, got {_short(value)}")
    return float(min(value, sys.float_info.max))


def holding_time(delay: Any, at: Any, now: float) -> float:
    """Return how long to hold a message back, in seconds, from ``delay`` or ``at``.

    Args:
        delay: Seconds or ``timedelta``, or None.
        at: Aware ``datetime``, or None; one in the past means now.
        now: The present, in seconds since the epoch.

    Raises:
        Invalid: If both are given, ``at`` is naive, or either is out of range.
    """
    if at is None:
        return 0.0 if delay is None else seconds("delay", delay)
    if delay is not None:
        raise Invalid("delay and at: expected one of the two, got both")
    if not isinstance(at, datetime):
        raise Invalid(f"at: expected an aware datetime, got {_short(at)}")
    if at.tzinfo is None or at.utcoffset() is None:
        raise Invalid(
            f"at: expected an aware datetime, got the naive {at.isoformat()}; "
            "give it a zone, e.g. datetime.now(timezone.utc)"
        )
    # Subtracted as it is: datetimes next to the first and the last cannot be converted to UTC.
    ahead = (at - datetime.fromtimestamp(now, timezone.utc)).total_seconds()
    return seconds("at", max(0.0, ahead))


def body_size(body: bytes, maximum: int) -> None:
    """Check the size of an encoded body.

    Raises:
        Invalid: If it is over ``maximum`` bytes.
    """
    if len(body) > maximum:
        raise Invalid(
            f"too large: the encoded body has {len(body):,} bytes, the limit is {maximum:,}; "
            "store the data elsewhere and publish a reference, or raise max_body"
        )


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        # Integers of more than 4,300 digits, and objects with a faulty __repr__.
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."
