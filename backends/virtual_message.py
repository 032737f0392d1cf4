"""Kombu's messages, as its virtual transports hand them on, and kq's envelopes: one made of the other."""

from __future__ import annotations

from typing import Any, Final
from uuid import uuid4

from kq.backends.store import Lease
from kq.envelope import Envelope, unpack_or_wrap

#: Properties that are Kombu's own book-keeping and do not travel.
_LOCAL: Final = frozenset({"delivery_info", "delivery_tag", "body_encoding"})


def to_envelope(message: dict[str, Any]) -> Envelope:
    """Turn Kombu's message into an envelope."""
    properties = {key: value for key, value in message["properties"].items() if key not in _LOCAL and value is not None}
    for key, name in (("content-type", "content_type"), ("content-encoding", "content_encoding")):
        if message.get(key) is not None:
            properties[name] = message[key]
    route = message["properties"].get("delivery_info") or {}
    if route.get("exchange"):
        properties["delivery_info"] = {"exchange": route["exchange"], "routing_key": route.get("routing_key")}
    body = message["body"]
    id = properties.get("message_id")
    return Envelope(
        id if isinstance(id, str) and id else uuid4().hex,
        dict(message.get("headers") or {}),
        properties,
        body.encode() if isinstance(body, str) else bytes(body or b""),
    )


def to_payload(lease: Lease, queue: str, tag: str) -> dict[str, Any]:
    """Turn a leased envelope into the mapping that Kombu makes its message from."""
    envelope = unpack_or_wrap(lease.raw, lease.id)
    properties = dict(envelope.properties)
    content_type = properties.pop("content_type", None)
    content_encoding = properties.pop("content_encoding", None)
    properties.setdefault("message_id", envelope.id)
    properties["delivery_tag"] = tag
    route = properties.get("delivery_info")
    properties["delivery_info"] = {
        "exchange": "",
        "routing_key": queue,
        **(route if isinstance(route, dict) else {}),
        "redelivered": bool(lease.attempts or lease.deliveries),
    }
    return {
        "body": envelope.body,
        "content-type": content_type,
        "content-encoding": content_encoding,
        "headers": envelope.headers,
        "properties": properties,
    }


def milliseconds(value: Any) -> int:
    """Read a time to live as AMQP writes it; 0 for none. One of 0 ms expires at once: the least we count."""
    try:
        return max(1, int(value))
    except (TypeError, ValueError):
        return 0
