"""Payload to body and back, without trusting either side.

Two codecs: JSON and msgpack. Decoding never decompresses, never builds objects and never guesses:
the content type and the encoding must be on the lists below before a byte is parsed. Kombu's own
``Message.payload`` is not used, because it decompresses and loads before it checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import NoneType
from typing import Any, Final

import msgspec

from kq.errors import Invalid
from kq.limit import MAX_NESTING
from kq.plain_keys import has_plain_keys

_NESTING_BYTES: Final = (b"[", b"{")
#: Bytes of a body from which on it is searched for them, not counted through.
_LONG: Final = 8192
#: Values of a payload up to which they are looked at one by one; fewer than can be nested too deeply.
_FEW: Final = 32


class Undecodable(Exception):
    """A body that cannot be read; the text is the reason for the dead-letter queue."""


class Codec(msgspec.Struct, frozen=True):
    """One way to write payloads down.

    Attributes:
        name: What ``app.queue(codec=...)`` calls it.
        content_type: The content type it writes.
        content_encoding: The content encoding it writes.
        accepts: The encodings it reads, in lower case.
        encode: Payload to body; raises ``Invalid``.
        decode: Body to payload; raises ``Undecodable``.
    """

    name: str
    content_type: str
    content_encoding: str
    accepts: frozenset[str]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def is_empty(data: Any) -> bool:
    """Tell whether ``data`` is nothing to publish: None, or an empty string, mapping or list."""
    return data is None or (isinstance(data, (str, bytes, bytearray, dict, list, tuple)) and len(data) == 0)


def named(name: str) -> Codec:
    """Return the codec of a queue's ``codec`` option.

    Raises:
        Invalid: If there is none of that name.
    """
    try:
        return CODECS[name]
    except (KeyError, TypeError):
        raise Invalid(f"codec: expected one of {', '.join(CODECS)}; got {name!r}") from None


def decode(body: bytes, content_type: Any, content_encoding: Any, default: Codec) -> Any:
    """Return the payload of a body, after its type and encoding have been checked.

    Args:
        body: The bytes as the broker gave them.
        content_type: The message's, or None for the queue's own codec.
        content_encoding: The message's, or None for the codec's own.
        default: The queue's codec.

    Raises:
        Undecodable: If type or encoding are not accepted, or the body does not parse within the limits.
    """
    codec = default
    for what, value in (("content type", content_type), ("content encoding", content_encoding)):
        if value is not None and not isinstance(value, str):
            raise Undecodable(f"the {what} is {value!r}; expected text")
    if content_type:
        found = _BY_CONTENT_TYPE.get(content_type.split(";", 1)[0].strip().lower())
        if found is None:
            raise Undecodable(
                f"content type {content_type!r} is not accepted; expected {' or '.join(_BY_CONTENT_TYPE)}"
            )
        codec = found
    if content_encoding and content_encoding.lower() not in codec.accepts:
        raise Undecodable(
            f"content encoding {content_encoding!r} is not accepted for {codec.content_type}; "
            f"expected {codec.content_encoding}"
        )
    return codec.decode(body)


# JSON ---------------------------------------------------------------------------------------------


def _encode_json(data: Any) -> bytes:
    # msgspec is fast but lenient: it writes NaN as null and turns dates, bytes and integer keys into
    # strings. What it wrote is therefore read back: equal means that nothing was altered, and both
    # steps run in C. Anything else goes the slow way, which either explains or (tuples) accepts.
    # Where much was written for few values, looking at these takes less than reading back.
    try:
        body = msgspec.json.encode(data)
        if len(body) >= _LONG and _is_plain(data):
            return body
        if _shallow(body) and msgspec.json.decode(body) == data:
            return body
    except (TypeError, ValueError, OverflowError, RecursionError, UnicodeError, msgspec.MsgspecError):
        pass
    _check(data, binary=False)
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:
        raise Invalid(f"not encodable as JSON: {error}") from None


def _decode_json(body: bytes) -> Any:
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise Undecodable(f"the body is not JSON: {_reason(error)}") from None
    if not _shallow(body):
        _check_received(value)
    return value


# msgpack ------------------------------------------------------------------------------------------


def _encode_msgpack(data: Any) -> bytes:
    _check(data, binary=True)
    try:
        return msgspec.msgpack.encode(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise Invalid(f"not encodable as msgpack: {error}") from None


def _decode_msgpack(body: bytes) -> Any:
    if not has_plain_keys(body):
        raise Undecodable("the body cannot be taken: a map has a key that is no string")
    try:
        value = msgspec.msgpack.decode(body)
    except (ValueError, RecursionError, TypeError, msgspec.MsgspecError) as error:
        raise Undecodable(f"the body is not msgpack: {_reason(error)}") from None
    _check_received(value)
    return value


# Shared -------------------------------------------------------------------------------------------


def _is_plain(data: Any) -> bool:
    """Tell whether a payload is a few values of exactly the types that JSON has; False where it takes long to tell."""
    values = [data]
    at = 0
    while at < len(values):
        value = values[at]
        kind = type(value)
        if kind is dict or kind is list:
            if len(values) + len(value) > _FEW:
                return False
            if kind is dict and not all(type(key) is str for key in value):
                return False
            values += value.values() if kind is dict else value
        elif kind is float:
            if not math.isfinite(value):
                return False
        elif kind not in (str, int, bool, NoneType):
            return False
        at += 1
    return True


def _shallow(body: bytes) -> bool:
    """Tell whether a body has too few brackets to be nested too deeply, without walking it."""
    if len(body) < _LONG:
        return body.count(_NESTING_BYTES[0]) + body.count(_NESTING_BYTES[1]) <= MAX_NESTING
    # `count` looks at each byte, `find` at many at a time.
    left = MAX_NESTING
    for bracket in _NESTING_BYTES:
        at = body.find(bracket)
        while at >= 0:
            left -= 1
            if left < 0:
                return False
            at = body.find(bracket, at + 1)
    return True


def _check_received(value: Any) -> None:
    try:
        _check(value, binary=True)
    except Invalid as error:
        raise Undecodable(f"the body cannot be taken: {str(error).removeprefix('not encodable: ')}") from None


#: A place in a payload: that of what holds it, and where in there; None for the payload itself.
_Place = tuple["_Place", str | int] | None
#: Characters of a key that an error shows.
_SHOWN: Final = 80


def _check(data: Any, *, binary: bool) -> None:
    """Walk a payload and refuse what cannot travel unaltered.

    Raises:
        Invalid: Naming the place, e.g. ``payload.items[3].price``.
    """
    # A list of things still to see instead of recursion: depth is the caller's to choose. Where they are is put into
    # words for an error only: the names of a stranger's keys may be long, and there may be many of them.
    pending: list[tuple[Any, _Place, int]] = [(data, None, 1)]
    while pending:
        value, place, depth = pending.pop()
        if value is None or isinstance(value, (bool, int)):
            continue
        if isinstance(value, str):
            if not value.isascii():
                _check_text(value, place)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise Invalid(f"not encodable: {_named(place)} is {value!r}; expected a finite number")
        elif isinstance(value, (dict, list, tuple)):
            if depth > MAX_NESTING:
                raise Invalid(f"not encodable: nested deeper than {MAX_NESTING} levels at {_named(place)[:80]}")
            if isinstance(value, dict):
                for key, item in value.items():
                    if not isinstance(key, str):
                        shown = repr(key)[:_SHOWN]
                        raise Invalid(f"not encodable: {_named(place)} has the key {shown}; expected string keys")
                    if not key.isascii():
                        _check_text(key, place, "a key of ")
                    pending.append((item, (place, key), depth + 1))
            else:
                pending.extend((item, (place, i), depth + 1) for i, item in enumerate(value))
        elif not (binary and isinstance(value, (bytes, bytearray))):
            raise Invalid(
                f"not encodable: {_named(place)} is of type {type(value).__name__}; expected None, bool, int, "
                "float, str, list or dict" + (" or bytes" if binary else "")
            )


def _check_text(text: str, place: _Place, what: str = "") -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Invalid(f"not encodable: {what}{_named(place)} holds a lone surrogate, which is no text") from None


def _named(place: _Place) -> str:
    """Return a place in words, as ``payload.items[3].price``; of long names their start."""
    steps = []
    while place is not None:
        place, step = place
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step[:_SHOWN]}")
    return "payload" + "".join(reversed(steps))


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


JSON: Final = Codec(
    name="json/plain",
    content_type="application/json",
    content_encoding="utf-8",
    accepts=frozenset({"utf-8", "utf8", "ascii", "us-ascii"}),
    encode=_encode_json,
    decode=_decode_json,
)
MSGPACK: Final = Codec(
    name="application/msgpack",
    content_type="application/msgpack",
    content_encoding="binary",
    accepts=frozenset({"binary"}),
    encode=_encode_msgpack,
    decode=_decode_msgpack,
)

#: Every codec, by the name that queues use.
CODECS: Final = {codec.name: codec for codec in (JSON, MSGPACK)}

_BY_CONTENT_TYPE: Final = {codec.content_type: codec for codec in (JSON, MSGPACK)}
