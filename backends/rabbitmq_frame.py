"""Reads message headers that py-amqp cannot: those of strangers, with text that is no UTF-8, and worse.

py-amqp raises in the middle of a frame; the broker would send the same message to the next worker, and the
next. Here such a header is rewritten before py-amqp reads it again: text that is no UTF-8 is escaped, and a
table that makes no sense is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from struct import pack, unpack_from
from typing import Any, Final

from amqp.exceptions import FrameSyntaxError
from amqp.method_framing import frame_handler
from amqp.serialization import loads

#: The type of a frame that holds a content's header.
_HEADER: Final = 2
_NAMES: Final = (
    "content_type", "content_encoding", "headers", "delivery_mode", "priority", "correlation_id", "reply_to",
    "expiration", "message_id", "timestamp", "type", "user_id", "app_id", "cluster_id",
)  # fmt: skip
#: The basic properties in their order: the flag that says that it is there, its name, and its type: short string,
#: table, octet, timestamp.
FIELDS: Final = tuple(
    (1 << (15 - place), name, kind) for place, (name, kind) in enumerate(zip(_NAMES, "ssFoossssTssss", strict=True))
)
#: Bytes of a header before its flags, and of the flags.
_FLAGS_AT: Final = 12
_FLAGS: Final = 2
#: Bytes of a short string at most.
_SHORT: Final = 255

# What py-amqp raises when a header makes no sense, e.g. a date out of range.
UNREADABLE: Final = (ValueError, OverflowError, ArithmeticError, RecursionError, TypeError, struct.error, LookupError,
                     OSError, FrameSyntaxError)  # fmt: skip


def lenient_frame_handler(connection: Any, callback: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return py-amqp's reader of frames, for ``amqp.Connection(frame_handler=...)``."""
    dispatched = False

    def dispatch(*arguments: Any) -> Any:
        nonlocal dispatched
        dispatched = True
        return callback(*arguments)

    strict = frame_handler(connection, dispatch)

    def on_frame(frame: tuple[int, int, bytes]) -> Any:
        nonlocal dispatched
        kind, channel, raw = frame
        if kind != _HEADER:
            return strict(frame)
        dispatched = False
        try:
            return strict(frame)
        except UNREADABLE:
            if dispatched:
                raise
        return strict((kind, channel, legible_header(bytes(raw))))

    return on_frame


def legible_header(raw: bytes) -> bytes:
    """Return a content header with properties that can be read."""
    (flags,) = unpack_from(">H", raw, _FLAGS_AT)
    offset = _FLAGS_AT + _FLAGS
    parts = [raw[:offset]]
    for bit, _, kind in FIELDS:
        if not flags & bit:
            continue
        if kind == "s":
            size = 1 + raw[offset]
            parts.append(_short(raw[offset + 1 : offset + size]))
        elif kind == "F":
            size = 4 + unpack_from(">I", raw, offset)[0]
            parts.append(_table(raw[offset : offset + size]))
        else:
            size = 8 if kind == "T" else 1
            parts.append(raw[offset : offset + size])
        offset += size
    return b"".join(parts)


def _short(raw: bytes) -> bytes:
    text = legible(raw).encode()
    return pack("B", len(text)) + text


def _table(raw: bytes) -> bytes:
    try:
        loads("F", raw, 0)
    except UNREADABLE:
        return pack(">I", 0)
    return raw


def legible(text: str | bytes) -> str:
    """Return a short string as UTF-8 can hold it: what it cannot is escaped, and what is too long cut off."""
    if isinstance(text, str):
        if text.isascii():
            return text
        text = text.encode("utf-8", "surrogatepass")
    return text.decode("utf-8", "backslashreplace").encode()[:_SHORT].decode("utf-8", "ignore")
