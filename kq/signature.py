"""Who published a message, and that nobody has altered it: the header ``x_sig``.

::

    x_sig    1.<claims>.<mac>            base64url without padding
    claims   {"key", "queue", "issued_at_ms", "expires_at_ms", "actor", "groups"}
    mac      HMAC-SHA256(the key's secret, PREFIX + [message id, type, content type, content encoding,
             x_expires_at, user headers, SHA-256 of the body, claims as they stand in x_sig])

Each value in the list is written with its type and length (`kq.canonical`), so that no two messages give the
same bytes. The queue id is covered as a part of the claims: there it can be read, so that a message that
was moved to another queue is told from one that was altered. kq's own headers are not covered, but for
``x_expires_at``: they change while a message is retried.

How long a signature holds is the signer's to say. A verifier with a greatest age of its own would refuse
messages that were held back for longer, so there is none. docs/wire-format.md has the bytes and an example.
"""

from __future__ import annotations

import hmac
import json
import math
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

import msgspec

from kq import canonical
from kq.errors import Invalid
from kq.keyring import KEY_ID, Keyring
from kq.limit import MAX_NESTING

#: The header that carries a signature.
HEADER: Final = "x_sig"
#: Bytes of a signature, claims included.
MAX_SIZE: Final = 4 * 1024
#: Seconds by which a signer's clock may be ahead of the verifier's.
CLOCK_SKEW: Final = 60.0

#: What the bytes under every MAC start with: a MAC that the same secret made for another purpose is none here.
PREFIX: Final = b"kq signature 1\n"

_SHAPE: Final = re.compile(r"1\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]{43})")
_CLAIMS: Final = frozenset({"key", "queue", "issued_at_ms", "expires_at_ms", "actor", "groups"})
_RESERVED_PREFIX: Final = "x_"
#: Milliseconds since the epoch beyond which some languages' JSON numbers are no longer exact.
_LAST_MOMENT: Final = 2**53
#: Characters of foreign text in a reason.
_CLIP: Final = 100

_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Unverified(Exception):
    """A message that cannot be trusted; the text is the reason for the dead-letter queue."""


class Signed(msgspec.Struct, frozen=True):
    """What a signature covers, as the broker carries it.

    Attributes:
        queue_id: The queue it is published to, or arrived on.
        message_id: The message's id.
        headers: All of them; those that start with ``x_`` are not covered, but for ``x_expires_at``.
        properties: All of them; ``type``, ``content_type`` and ``content_encoding`` are covered.
        body: The encoded payload.
    """

    queue_id: str
    message_id: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    body: bytes


class Claims(msgspec.Struct, frozen=True):
    """What a signature that proved right says.

    Attributes:
        key_id: The key that signed.
        queue_id: The queue the message was published to.
        issued_at: Seconds since the epoch, whole milliseconds.
        expires_at: Likewise; from then on the signature is worth nothing.
        actor_id: Who published, or None where there was no actor.
        actor_meta: Facts about the actor, JSON values.
        groups: The policy groups under which the actor published.
    """

    key_id: str
    queue_id: str
    issued_at: float
    expires_at: float
    actor_id: str | None
    actor_meta: Mapping[str, Any]
    groups: tuple[str, ...]


def sign(
    keyring: Keyring,
    signed: Signed,
    *,
    issued_at: float,
    expires_at: float,
    actor_id: str | None = None,
    actor_meta: Mapping[str, Any] | None = None,
    groups: Sequence[str] = (),
) -> str:
    """Return the value of the header ``x_sig``: at most 4 KiB of printable ASCII.

    Thread-safe; about 15 microseconds for a small message.

    Args:
        keyring: Its ``sign_with`` signs.
        signed: The message as it will travel.
        issued_at: The present, in seconds since the epoch.
        expires_at: When the signature ends, likewise: the delay and the time to be handled, retried and
            replayed must fit in. Both are rounded to milliseconds.
        actor_id: Who publishes, or None.
        actor_meta: Facts about the actor: JSON values; tuples travel as lists.
        groups: The policy groups under which the actor publishes.

    Raises:
        Invalid: If the keyring only verifies, a header or the meta has no bytes, or the claims are too large.
    """
    key_id = keyring.sign_with
    if key_id is None:
        raise Invalid("this keyring only verifies; name the key that signs in sign_with")
    if isinstance(groups, str) or not all(isinstance(group, str) for group in groups):
        raise Invalid("signature: expected a sequence of group names, got " + _kind(groups))
    try:
        issued_at_ms, expires_at_ms = _milliseconds("issued_at", issued_at), _milliseconds("expires_at", expires_at)
        if expires_at_ms <= issued_at_ms:
            raise ValueError("expected expires_at after issued_at, got a signature that would never be worth anything")
        text = _to_json(
            {
                "key": key_id,
                "queue": signed.queue_id,
                "issued_at_ms": issued_at_ms,
                "expires_at_ms": expires_at_ms,
                "actor": _actor(actor_id, actor_meta),
                "groups": list(groups),
            }
        )
        claims = _base64(text.encode())
        mac = _mac(keyring, key_id, signed, claims)
    except UnicodeEncodeError:
        raise Invalid("signature: the queue id, actor or groups hold a lone surrogate, which is no text") from None
    except canonical.Uncoverable as error:
        raise Invalid(f"signature: expected a message of text, numbers and bools, got {error}") from None
    except ValueError as error:
        raise Invalid(f"signature: {error}") from None
    x_sig = f"1.{claims}.{mac}"
    if len(x_sig) > MAX_SIZE:
        raise Invalid(
            f"signature: expected at most {MAX_SIZE:,} bytes, got {len(x_sig):,}: the actor's meta is too large "
            "to travel with each message; keep in it only what policies read"
        )
    return x_sig


def verify(keyring: Keyring, x_sig: Any, signed: Signed, *, now: float | None) -> Claims:
    """Return what a signature says, if one of the keys made it for this message, queue and time.

    Thread-safe; about 15 microseconds for a small message. The claims say who published; whether they may
    is the caller's question.

    Args:
        keyring: Any of its keys.
        x_sig: The header's value, whatever it is; None where there is none.
        signed: The message as it arrived.
        now: Seconds since the epoch; None where it does not matter when.

    Raises:
        Unverified: With the reason, whatever the message and its signature hold; nothing else is raised.
    """
    if x_sig is None:
        raise Unverified("unsigned")
    shape = _SHAPE.fullmatch(x_sig) if isinstance(x_sig, str) and len(x_sig) <= MAX_SIZE else None
    found = None if shape is None else _read(shape[1])
    if shape is None or found is None:
        raise Unverified("malformed signature")
    if found.key_id not in keyring:
        raise Unverified(f"unknown key {found.key_id!r}")
    try:
        expected = _mac(keyring, found.key_id, signed, shape[1])
    except canonical.Uncoverable as error:
        raise Unverified(_clip(f"altered: no signature covers {error}")) from None
    # As text: another spelling of the same MAC is another text.
    if not hmac.compare_digest(expected, shape[2]):
        raise Unverified("altered")
    if found.queue_id != signed.queue_id:
        raise Unverified(f"signed for queue {_clip(found.queue_id)}, arrived on {_clip(signed.queue_id)}")
    if now is None:
        return found
    if now >= found.expires_at:
        raise Unverified(f"expired {now - found.expires_at:.1f} s ago")
    if found.issued_at > now + CLOCK_SKEW:
        raise Unverified("issued in the future")
    return found


# Claims -------------------------------------------------------------------------------------------


def _read(text: str) -> Claims | None:
    """Return the claims that a part of ``x_sig`` holds, or None; nobody has vouched for them yet."""
    try:
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        if _base64(raw) != text:
            return None
        claims = _from_json(raw.decode())
        if b"\\u" in raw:
            # An escaped lone surrogate would be text that nothing can write.
            _to_json(claims).encode()
    except (Base64Error, ValueError, RecursionError):
        return None
    if not isinstance(claims, dict) or claims.keys() != _CLAIMS:
        return None
    key_id, queue_id, actor, groups = claims["key"], claims["queue"], claims["actor"], claims["groups"]
    issued_at, expires_at = claims["issued_at_ms"], claims["expires_at_ms"]
    if not (
        isinstance(key_id, str)
        and KEY_ID.fullmatch(key_id)
        and isinstance(queue_id, str)
        and _is_moment(issued_at)
        and _is_moment(expires_at)
        and isinstance(groups, list)
        and all(isinstance(group, str) for group in groups)
    ):
        return None
    actor_id: Any = None
    actor_meta: Any = {}
    if actor is not None:
        if not isinstance(actor, dict) or actor.keys() != {"id", "meta"}:
            return None
        actor_id, actor_meta = actor["id"], actor["meta"]
        if not isinstance(actor_id, str) or not isinstance(actor_meta, dict):
            return None
    return Claims(key_id, queue_id, issued_at / 1000, expires_at / 1000, actor_id, actor_meta, tuple(groups))


def _is_moment(value: Any) -> bool:
    # The exact type: JSON's true is an int in Python, and 1.0 another spelling of 1.
    return type(value) is int and 0 <= value <= _LAST_MOMENT


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("expected finite numbers")
    return value


_from_json = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode


def _actor(id: Any, meta: Any) -> dict[str, Any] | None:
    if id is None and not meta:
        return None
    if isinstance(id, str) and (meta is None or isinstance(meta, Mapping)):
        return {"id": id, "meta": _plain(meta, 1) if meta else {}}
    raise ValueError(f"expected an actor's id as text and meta as a mapping, got {_kind(id)} and {_kind(meta)}")


def _plain(value: Any, depth: int) -> Any:
    """Return a JSON value made of nothing but dicts, lists and scalars.

    Raises:
        ValueError: If it is none, or nested too deeply.
    """
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth > MAX_NESTING:
        raise ValueError(f"the actor's meta is nested deeper than {MAX_NESTING} levels")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise ValueError(f"the actor's meta holds {_kind(value)}; expected JSON values")


def _milliseconds(name: str, value: float) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LAST_MOMENT // 1000:
        raise ValueError(f"{name}: expected seconds since the epoch, got {_kind(value)}")
    return round(value * 1000)


def _base64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


# What is under the MAC ----------------------------------------------------------------------------


def _mac(keyring: Keyring, key_id: str, signed: Signed, claims: str) -> str:
    """Return the MAC over a message and its claims; raises ``Uncoverable`` if a value has no bytes."""
    headers, properties = signed.headers, signed.properties
    covered = canonical.encode(
        (
            signed.message_id,
            properties.get("type"),
            properties.get("content_type"),
            properties.get("content_encoding"),
            headers.get("x_expires_at"),
            {k: v for k, v in headers.items() if not (isinstance(k, str) and k.startswith(_RESERVED_PREFIX))},
            sha256(signed.body).digest(),
            claims,
        )
    )
    return _base64(keyring.mac(key_id, PREFIX + covered))


def _kind(value: Any) -> str:
    """Say what a value is, without saying its value."""
    return f"a value of type {type(value).__name__}"


def _clip(text: str) -> str:
    """Return foreign text as a reason may show it: printable, and not long."""
    return "".join(char if char.isprintable() else "?" for char in text[:_CLIP])
