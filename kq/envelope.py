"""A message as it travels, and as it lies in a store or among the dead letters.

Pure: nothing here does I/O. docs/wire-format.md has the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from kq.outcome import Death, Outcome
from kq.plain_keys import has_plain_keys

#: The version of the wire format, sent as the header ``x_kq``.
WIRE_VERSION: Final = 1

#: Attempts and crashes of a message, where the broker has no place for them but the headers...
COUNTERS: Final = ("x_attempts", "x_crashes")
#: ...and of a dead letter that somebody handles: the others tell of its first life.
DEAD_COUNTERS: Final = ("x_dead_attempts", "x_dead_crashes")

#: Deliveries that nobody settled, where a broker's own count does not know of them all.
DELIVERIES: Final = "x_deliveries"

#: When a dead letter would have expired.
DEAD_EXPIRY: Final = "x_dead_expires_at"


class Envelope(msgspec.Struct, array_like=True):
    """A message as it travels.

    Attributes:
        id: The message's id.
        headers: The user's headers and kq's own.
        properties: AMQP's basic properties by name, e.g. ``content_type`` and ``priority``.
        body: The encoded payload and nothing else.
    """

    id: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: bytes

    @property
    def priority(self) -> int:
        """The level from 0 to 9 that the broker sorts by; 4 where none can be read."""
        value = self.properties.get("priority")
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 9 else 4


class _Identity(msgspec.Struct, array_like=True):
    """The head of an `Envelope`; what follows is skipped."""

    id: str


class _Heads(msgspec.Struct, array_like=True):
    """What stands before the body of an `Envelope`, not decoded; what follows is skipped."""

    id: msgspec.Raw
    headers: msgspec.Raw
    properties: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
#: How msgpack begins bytes, by how many bytes their length takes (https://github.com/msgpack/msgpack/blob/master/spec.md).
_BIN_8, _BIN_16, _BIN_32 = b"\xc4", b"\xc5", b"\xc6"
#: Bytes of a body from which on it is not left to the encoder, which moves to more and more memory as it writes.
_LONG = 1 << 16
_decoder = msgspec.msgpack.Decoder(Envelope)
_identity_decoder = msgspec.msgpack.Decoder(_Identity)
_heads_decoder = msgspec.msgpack.Decoder(_Heads)
#: Bytes of an envelope from which on its headers may be many.
_MANY = 1 << 14


def pack(envelope: Envelope) -> bytes:
    """Return an envelope as bytes: a msgpack array of id, headers, properties and body."""
    if len(envelope.body) >= _LONG:
        return pack_pieces(envelope, (envelope.body,))
    return _encoder.encode(envelope)


def pack_pieces(envelope: Envelope, pieces: Sequence[bytes]) -> bytes:
    """Return what `pack` returns where these bytes, one after the other, are the body; they are copied once."""
    size = sum(map(len, pieces))
    if size < _LONG and len(pieces) == 1:
        return pack(Envelope(envelope.id, envelope.headers, envelope.properties, pieces[0]))
    # An empty body is two bytes at the end, for which its own head stands in.
    head = pack(Envelope(envelope.id, envelope.headers, envelope.properties, b""))[:-2]
    kind, length = (_BIN_8, 1) if size < 1 << 8 else (_BIN_16, 2) if size < 1 << 16 else (_BIN_32, 4)
    return b"".join((head, kind, size.to_bytes(length, "big"), *pieces))


def unpack(raw: bytes) -> Envelope:
    """Return the envelope that ``raw`` holds.

    Raises:
        ValueError: If it holds none.
    """
    try:
        if len(raw) >= _MANY:
            # Without a look at the body, which may be long.
            heads = _heads_decoder.decode(raw)
            if not (has_plain_keys(bytes(heads.headers)) and has_plain_keys(bytes(heads.properties))):
                raise ValueError("a map has a key that is no string")
        return _decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"not an envelope: {error}") from None


def identify(raw: bytes, id: str) -> str:
    """Return the id of the envelope that ``raw`` holds, or ``id`` where it holds none; cheaper than `unpack`."""
    try:
        return _identity_decoder.decode(raw).id
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return id


def unpack_or_wrap(raw: bytes, id: str) -> Envelope:
    """Return the envelope that ``raw`` holds, or one with ``raw`` as its body."""
    try:
        return unpack(raw)
    except ValueError:
        return Envelope(id, {}, {"content_type": "application/octet-stream"}, raw)


def clean(envelope: Envelope) -> Envelope:
    """Return a dead letter as it was before: without kq's own headers, but for format version and signature."""
    kept = ("x_kq", "x_sig")
    headers = {key: value for key, value in envelope.headers.items() if not key.startswith("x_") or key in kept}
    return Envelope(envelope.id, headers, envelope.properties, envelope.body)


def _of_death(death: Death) -> dict[str, int]:
    said = {
        "x_exit_code": death.exit_code,
        "x_exit_signal": death.exit_signal,
        "x_peak_memory": death.peak_memory or None,
    }
    return {key: value for key, value in said.items() if value is not None}


#: Headers with what was found out about a death.
_FINDINGS: Final = frozenset({
    "x_error_kind", "x_error_message", "x_error_traceback", "x_exit_code", "x_exit_signal", "x_peak_memory",
})  # fmt: skip


def bury(envelope: Envelope, queue: str, outcome: Outcome, now: float) -> Envelope:
    """Return the dead letter of a message: itself, with headers that say why it is dead.

    Args:
        envelope: The message.
        queue: The queue that delivered it.
        outcome: A ``dead`` one.
        now: Seconds since the epoch.
    """
    # What is said here of a death is said of this one, not of an earlier one, and not by a stranger.
    headers = {key: value for key, value in envelope.headers.items() if key not in _FINDINGS}
    headers.update(
        x_attempts=outcome.attempts,
        x_crashes=outcome.crashes,
        x_original_queue=queue,
        x_dead_letter_reason=outcome.reason,
        x_dead_letter_time=now,
    )
    if "x_expires_at" in headers:
        # What was signed with it can still be verified.
        headers[DEAD_EXPIRY] = headers["x_expires_at"]
    for key in ("x_due_at", "x_delay_left", "x_expires_at", DELIVERIES, *DEAD_COUNTERS):
        # Whoever consumes the dead-letter queue starts at nought, and finds no letter expired.
        headers.pop(key, None)
    failure = outcome.failure
    if failure is not None:
        headers.update(x_error_kind=failure.kind, x_error_message=failure.message)
        if failure.traceback:
            headers["x_error_traceback"] = failure.traceback
        if failure.death is not None:
            headers.update(_of_death(failure.death))
    return Envelope(envelope.id, headers, envelope.properties, envelope.body)
