"""Puts deliveries together from their frames, without py-amqp, which takes several times as long for each.

A delivery is a method, a header with properties, and as many bodies as it needs; on one channel nothing comes in
between. What a stranger has written, and nobody can read, is left out or escaped: a message that cannot be read here
would be sent to the next worker, and the next.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from struct import Struct
from typing import Any, Final

from amqp.exceptions import UnexpectedFrame
from amqp.serialization import loads

from kq.backends.rabbitmq_frame import FIELDS, UNREADABLE, legible, lenient_frame_handler
from kq.backends.rabbitmq_topology import legible_table
from kq.envelope import Envelope

#: Takes a delivery: its tag, whether it was delivered before, what it holds, without the body, and the body, in pieces.
Receive = Callable[[int, bool, Envelope, list[bytes]], None]

_METHOD: Final = 1
_HEADER: Final = 2
_BODY: Final = 3
#: The numbers of the method's class and of the method.
_DELIVER: Final = b"\x00\x3c\x00\x3c"
_TAG_AND_FLAG: Final = Struct(">QB")
#: A header's class, its weight, the size of the bodies together, and which properties follow.
_HEAD: Final = Struct(">HHQH")
_TIMESTAMP: Final = Struct(">Q")
_SIZE: Final = Struct(">I")

#: Bytes of the tables of headers that are remembered, and of the largest: as a rule all messages have the same few.
_TABLES_BYTES: Final = 2**18
_TABLE_BYTES: Final = 2**12
_SIMPLE: Final = (str, int, float, bool, type(None))
#: Types of values in a table: text, nothing, and those of a fixed size, as py-amqp reads them.
_STRING: Final = ord("S")
_VOID: Final = ord("V")
_ARRAY: Final = ord("A")
#: A list of tables that RabbitMQ gives to each message that a delay held back, longer than all else. Nobody reads it.
_DEATHS: Final = "x-death"
_NUMBERS: Final = {ord(kind): Struct(">" + code) for kind, code in zip("tbBsUuIiLlfd", "?bBhhHiIqqfd", strict=True)}


class _Partial:
    """A delivery of which not everything has come."""

    __slots__ = ("chunks", "header", "missing", "receive", "redelivered", "tag")

    def __init__(self, receive: Receive, tag: int, redelivered: bool) -> None:
        self.receive = receive
        self.tag = tag
        self.redelivered = redelivered
        self.header = b""
        self.missing = 0
        self.chunks: list[bytes] = []


class Deliveries:
    """What arrives on one connection.

    Attributes:
        receivers: Who takes the deliveries of a subscription, by the number of its channel and its tag.
    """

    def __init__(self) -> None:
        self.receivers: dict[tuple[int, str], Receive] = {}
        self._partial: dict[int, _Partial] = {}
        self._tables: dict[bytes, dict[str, Any]] = {}
        self._tables_bytes = 0

    def frame_handler(self, connection: Any, callback: Callable[..., Any]) -> Callable[[Any], Any]:
        """Return a reader of frames, for ``amqp.Connection(frame_handler=...)``; all but deliveries is py-amqp's."""
        others = lenient_frame_handler(connection, callback)
        partial = self._partial

        def on_frame(frame: tuple[int, int, bytes]) -> Any:
            kind, channel, raw = frame
            if channel in partial:
                # By these it knows that the broker lives.
                connection.bytes_recv += 1
                return self._go_on(partial[channel], kind, channel, raw)
            if kind == _METHOD and raw.startswith(_DELIVER):
                begun = self._begin(channel, raw)
                if begun is not None:
                    connection.bytes_recv += 1
                    partial[channel] = begun
                    return False
            return others(frame)

        return on_frame

    def _begin(self, channel: int, raw: bytes) -> _Partial | None:
        start = len(_DELIVER) + 1
        end = start + raw[start - 1]
        receive = self.receivers.get((channel, raw[start:end].decode(errors="replace")))
        if receive is None:
            return None
        tag, flag = _TAG_AND_FLAG.unpack_from(raw, end)
        return _Partial(receive, tag, bool(flag))

    def _go_on(self, delivery: _Partial, kind: int, channel: int, raw: bytes) -> bool:
        if kind != (_BODY if delivery.header else _HEADER):
            raise UnexpectedFrame(f"got a frame of type {kind} in the middle of a delivery")
        if delivery.header:
            delivery.chunks.append(raw)
            delivery.missing -= len(raw)
        else:
            delivery.header = raw
            delivery.missing = _HEAD.unpack_from(raw)[2]
        if delivery.missing > 0:
            return False
        del self._partial[channel]
        delivery.receive(delivery.tag, delivery.redelivered, self._envelope(delivery.header), delivery.chunks)
        return True

    def _envelope(self, raw: bytes) -> Envelope:
        """Return a message without its body; the id of one that has none is empty."""
        flags = _HEAD.unpack_from(raw)[3]
        offset = _HEAD.size
        headers: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        try:
            for bit, name, kind in FIELDS:
                if not flags & bit:
                    continue
                if kind == "s":
                    start = offset + 1
                    offset = start + raw[offset]
                    properties[name] = _text(raw[start:offset])
                elif kind == "o":
                    properties[name] = raw[offset]
                    offset += 1
                elif kind == "T":
                    (properties[name],) = _TIMESTAMP.unpack_from(raw, offset)
                    offset += _TIMESTAMP.size
                else:
                    start = offset
                    offset += _SIZE.size + _SIZE.unpack_from(raw, offset)[0]
                    headers = self._table(raw[start:offset])
        except UNREADABLE:
            # Cut off in the middle: what was read until there is what there is.
            pass
        for name in ("expiration", "cluster_id"):
            properties.pop(name, None)
        return Envelope(properties.pop("message_id", ""), headers, properties, b"")

    def _table(self, raw: bytes) -> dict[str, Any]:
        known = self._tables.get(raw)
        if known is not None:
            return dict(known)
        table = plain_table(raw)
        if table is None:
            try:
                table = legible_table(loads("F", raw, 0)[0][0])
            except UNREADABLE:
                return {}
        if len(raw) <= _TABLE_BYTES and all(isinstance(value, _SIMPLE) for value in table.values()):
            self._tables_bytes += len(raw)
            if self._tables_bytes > _TABLES_BYTES:
                self._tables.clear()
                self._tables_bytes = len(raw)
            self._tables[raw] = dict(table)
        return table


def plain_table(raw: bytes) -> dict[str, Any] | None:
    """Return a table of names and values that are ASCII text, numbers, bools and nothing; None if it is another one.

    But for its deaths, which are left out. In half of the time that py-amqp takes; others are left to it.
    """
    table: dict[str, Any] = {}
    at, end = _SIZE.size, len(raw)
    try:
        while at < end:
            start = at + 1
            at = start + raw[at]
            name = raw[start:at].decode("ascii")
            kind = raw[at]
            at += 1
            if kind == _STRING:
                start = at + _SIZE.size
                at = start + int.from_bytes(raw[at:start], "big")
                table[name] = raw[start:at].decode("ascii")
            elif kind == _VOID:
                table[name] = None
            elif kind == _ARRAY and name == _DEATHS:
                at += _SIZE.size + _SIZE.unpack_from(raw, at)[0]
            else:
                number = _NUMBERS[kind]
                (table[name],) = number.unpack_from(raw, at)
                at += number.size
    except (UnicodeDecodeError, LookupError, struct.error):
        return None
    return table if at == end else None


def _text(raw: bytes) -> str:
    return raw.decode() if raw.isascii() else legible(raw)
