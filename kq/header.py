"""What a header may be, and which headers are also properties of the message.

Headers travel verbatim. Some are mirrored into the standard AMQP properties, so that a program
that is not kq finds them where it looks for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from kq.errors import Invalid

Value: TypeAlias = str | int | float | bool

#: Headers of one message.
MAX_COUNT: Final = 64
#: Bytes of all keys and values of one message.
MAX_TOTAL: Final = 16 * 1024
#: Bytes of a key.
MAX_KEY: Final = 128
#: Bytes of a value.
MAX_VALUE: Final = 4 * 1024
#: Bytes that AMQP can carry in a property such as ``correlation_id`` (a short string).
MAX_PROPERTY: Final = 255

#: Keys that are kq's own start with this.
RESERVED_PREFIX: Final = "x_"
#: What names a task's type in Celery's protocol; a plain message must not claim it.
TASK: Final = "task"

# Headers that a broker would obey, or that a reader would take for the broker's word.
_FORGED = re.compile(
    r"CC|BCC|x-death|x-delay|x-delivery-count|x-acquired-count|x-first-death-.*|x-last-death-.*", re.DOTALL
)

#: What names stand for; higher runs first.
PRIORITIES: Final[Mapping[str, int]] = {"low": 1, "normal": 4, "high": 7, "critical": 9}
#: The priority of a message that names none.
NORMAL: Final = 4

#: Headers mirrored into properties, and the property's name.
_MIRRORED: Final[Mapping[str, str]] = {
    "correlation_id": "correlation_id",
    "reply_to": "reply_to",
    "message_type": "type",
}


def check(headers: Mapping[str, Any] | None) -> dict[str, Value]:
    """Return a checked copy of a publisher's headers.

    Raises:
        Invalid: If there are too many or they are too long, or one is reserved, empty or of a type
            that cannot travel.
    """
    if not headers:
        if headers is None or isinstance(headers, Mapping):
            return {}
        raise Invalid(f"headers: expected a mapping, got {type(headers).__name__}")
    if not isinstance(headers, Mapping):
        raise Invalid(f"headers: expected a mapping, got {type(headers).__name__}")
    if len(headers) > MAX_COUNT:
        raise Invalid(f"headers: expected at most {MAX_COUNT}, got {len(headers)}")
    total = sum(_key_size(key) + _value_size(key, value) for key, value in headers.items())
    if total > MAX_TOTAL:
        raise Invalid(f"headers: expected at most {MAX_TOTAL:,} bytes together, got {total:,}")
    checked = {str.__str__(key): _plain(value) for key, value in headers.items()}
    if "priority" in checked:
        priority(checked["priority"])
    return checked


def priority(value: Any) -> int:
    """Return a priority header's level from 0 to 9; 9 runs first.

    Raises:
        Invalid: If it is neither a level nor one of the names.
    """
    if isinstance(value, str) and value in PRIORITIES:
        return PRIORITIES[value]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 9:
        return value
    raise Invalid(f"priority: expected an integer 0 to 9 or one of {', '.join(PRIORITIES)}; got {value!r}")


def properties(headers: Mapping[str, Value]) -> dict[str, str]:
    """Return the AMQP properties that mirror ``headers``: correlation_id, reply_to, type.

    One that is too long for a property stays a header only.
    """
    found: dict[str, str] = {}
    for key, name in _MIRRORED.items():
        if key in headers:
            text = str(headers[key])
            if len(text.encode()) <= MAX_PROPERTY:
                found[name] = text
    return found


def _plain(value: Value) -> Value:
    """Return what a broker carries of a value: of its own type, not of one that enums and others derive from it."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool):
        return value
    return int.__int__(value) if isinstance(value, int) else float.__float__(value)


def _key_size(key: Any) -> int:
    if not isinstance(key, str):
        raise Invalid(f"headers: expected string keys, got {key!r} of type {type(key).__name__}")
    if not key:
        raise Invalid("headers: a key is empty")
    size = len(_utf8(key, "key"))
    if size > MAX_KEY:
        raise Invalid(f"headers: expected keys of at most {MAX_KEY} bytes, got {size} in {key[:40]!r}...")
    if key.startswith(RESERVED_PREFIX):
        raise Invalid(f"headers: {key!r} is reserved: keys that start with {RESERVED_PREFIX!r} are kq's own")
    if key == TASK or _FORGED.fullmatch(key):
        raise Invalid(f"headers: {key!r} is reserved: brokers and workers give it a meaning of their own")
    return size


def _value_size(key: str, value: Any) -> int:
    if isinstance(value, str):
        size = len(_utf8(value, f"value of {key!r}"))
        if size > MAX_VALUE:
            raise Invalid(f"headers: {key!r}: expected at most {MAX_VALUE:,} bytes, got {size:,}")
        return size
    if isinstance(value, bool):
        return 1
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise Invalid(f"headers: {key!r}: expected an integer of at most 64 bits")
        return 8
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Invalid(f"headers: {key!r}: expected a finite number, got {value!r}")
        return 8
    raise Invalid(f"headers: {key!r}: expected a string, integer, float or bool, got {type(value).__name__}")


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Invalid(f"headers: a {what} holds a lone surrogate, which is no text") from None
