"""Frames of messages, as kq writes them and as py-amqp reads them."""

from __future__ import annotations

from struct import unpack_from
from typing import Any

import amqp

from kq.backends.rabbitmq_publication import Writer
from kq.envelope import Envelope

CHANNEL = 3
FRAME_MAX = 4096


def written(envelope: Envelope, exchange: str = "", routing_key: str = "app:q", writer: Writer | None = None) -> bytes:
    """Return what kq sends."""
    return (writer or Writer(CHANNEL, FRAME_MAX)).frames(exchange, routing_key, envelope)


def split(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return the frames in it: their types, channels and payloads."""
    frames = []
    at = 0
    while at < len(data):
        kind, channel, size = unpack_from(">BHI", data, at)
        assert size + 8 <= FRAME_MAX
        assert data[at + 7 + size] == 0xCE
        frames.append((kind, channel, data[at + 7 : at + 7 + size]))
        at += size + 8
    return frames


def read(data: bytes) -> Any:
    """Return the message as py-amqp reads it."""
    (_, _, method), (_, _, header), *bodies = split(data)
    message = amqp.Message(frame_method=(60, 40), frame_args=method)
    message.inbound_header(header)
    for _, _, body in bodies:
        message.inbound_body(body)
    assert message.ready
    return message
