"""What a delivery from RabbitMQ is made of, and how it is settled. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kq.backend import Delivery, Publication
from kq.envelope import Envelope, pack_pieces
from kq.outcome import Outcome


class Receipt(msgspec.Struct, eq=False):
    """How to settle a delivery."""

    epoch: int
    tag: int
    #: The message without its body, which is the last so many bytes of the delivery.
    envelope: Envelope
    size: int
    #: Whether going back once more would look to the broker like yet another dead worker: it counts every return of a
    #: quorum queue's message, and of a classic one's we do.
    counted: bool
    #: Whether it came with an id.
    is_named: bool
    #: Whether what takes its place is stored: it is never published twice.
    copied: bool = False
    #: What is to take its place, and on whose word, while that may be on its way over a blocked connection.
    copy: tuple[Outcome | None, Publication] | None = None


def pack(envelope: Envelope, body: Sequence[bytes]) -> bytes:
    """Return a message as a delivery has it, from its head and the pieces of its body."""
    try:
        return pack_pieces(envelope, body)
    except (TypeError, ValueError, OverflowError, RecursionError):
        # A stranger's headers may hold what msgpack has no type for.
        headers = {key: _plain(value) for key, value in envelope.headers.items()}
        return pack_pieces(Envelope(envelope.id, headers, envelope.properties, b""), body)


def envelope_of(delivery: Delivery) -> Envelope:
    """Return a message as it came, with all of its headers."""
    receipt: Receipt = delivery.receipt
    head = receipt.envelope
    # Not unpacked: what strangers have put into the headers may be deeper than can be read again.
    return Envelope(head.id, head.headers, head.properties, delivery.raw[len(delivery.raw) - receipt.size :])


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) or value is None else repr(value)
