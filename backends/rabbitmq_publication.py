"""Messages to publish as the frames that they are, without py-amqp, which takes several times as long for each."""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct, pack
from typing import Any, Final

from amqp.serialization import dumps

from kq.backends.rabbitmq_frame import FIELDS
from kq.backends.rabbitmq_topology import PROPERTIES, without_history
from kq.envelope import Envelope

_METHOD: Final = 1
_HEADER: Final = 2
_BODY: Final = 3
_FRAME: Final = Struct(">BHI")
_END: Final = b"\xce"
#: Of the class and of the method, and a field that is no longer used.
_PUBLISH: Final = pack(">HHH", 60, 40, 0)
#: Tell us if no queue takes it.
_MANDATORY: Final = b"\x01"
#: A header's class, its weight, the size of the body, and which properties follow.
_HEAD: Final = Struct(">HHQH")
_TIMESTAMP: Final = Struct(">Q")
#: What a frame has beside its payload.
_OVERHEAD: Final = 8

#: Tables of headers that are remembered: as a rule all messages have the same few.
_TABLES_MOST: Final = 500
_SIMPLE: Final = frozenset({str, int, float, bool, type(None)})


class TooLarge(Exception):
    """A message's headers do not fit into a frame, and RabbitMQ takes them in one.

    Attributes:
        size: Their bytes.
    """

    def __init__(self, size: int, most: int) -> None:
        super().__init__(f"the headers of the message take {size:,} bytes, RabbitMQ takes {most:,}")
        self.size = size


class Writer:
    """Makes frames for one channel.

    Args:
        channel: Its number.
        frame_max: Bytes of the largest frame.
    """

    def __init__(self, channel: int, frame_max: int) -> None:
        self._channel = channel
        self._piece = frame_max - _OVERHEAD
        self._methods: dict[tuple[str, str], bytes] = {}
        self._tables: dict[tuple[tuple[str, type, Any], ...], bytes] = {}

    def frames(self, exchange: str, routing_key: str, envelope: Envelope) -> bytes:
        """Return a message that the broker is to store, and to confirm or to give back.

        Raises:
            TooLarge: If its headers do not fit into a frame: RabbitMQ would close the connection.
        """
        body = envelope.body
        flags, properties = self._properties(envelope)
        most = self._piece - _HEAD.size
        if len(properties) > most:
            raise TooLarge(len(properties), most)
        parts: list[bytes | memoryview] = [
            self._method(exchange, routing_key),
            self._frame(_HEADER, _HEAD.pack(60, 0, len(body), flags) + properties),
        ]
        if len(body) <= self._piece:
            if body:
                parts.append(self._frame(_BODY, body))
        else:
            # Not copied but once, when all is joined.
            view = memoryview(body)
            for start in range(0, len(body), self._piece):
                piece = view[start : start + self._piece]
                parts += (_FRAME.pack(_BODY, self._channel, len(piece)), piece, _END)
        return b"".join(parts)

    def _frame(self, kind: int, payload: bytes) -> bytes:
        return b"%b%b%b" % (_FRAME.pack(kind, self._channel, len(payload)), payload, _END)

    def _method(self, exchange: str, routing_key: str) -> bytes:
        known = self._methods.get((exchange, routing_key))
        if known is None:
            if len(self._methods) >= _TABLES_MOST:
                self._methods.clear()
            payload = _PUBLISH + _short(exchange) + _short(routing_key) + _MANDATORY
            known = self._methods[exchange, routing_key] = self._frame(_METHOD, payload)
        return known

    def _properties(self, envelope: Envelope) -> tuple[int, bytes]:
        known = properties_of(envelope)
        flags, parts = 0, []
        for bit, name, kind in FIELDS:
            if kind == "F":
                flags |= bit
                parts.append(self._table(without_history(envelope.headers)))
                continue
            value = known.get(name)
            if value is None:
                continue
            flags |= bit
            if kind == "s":
                parts.append(_short(value))
            else:
                parts.append(bytes((value,)) if kind == "o" else _TIMESTAMP.pack(value))
        return flags, b"".join(parts)

    def _table(self, headers: Mapping[str, Any]) -> bytes:
        # With the types: 1, 1.0 and True are the same key of a dictionary.
        key = tuple([(name, type(value), value) for name, value in headers.items()])
        if not all(kind in _SIMPLE for _, kind, _ in key):
            return _packed(headers)
        known = self._tables.get(key)
        if known is None:
            if len(self._tables) >= _TABLES_MOST:
                self._tables.clear()
            known = self._tables[key] = _packed(headers)
        return known


def properties_of(envelope: Envelope) -> dict[str, Any]:
    """Return the basic properties that an envelope is published with."""
    known = {name: value for name in PROPERTIES if (value := envelope.properties.get(name)) is not None}
    known["message_id"] = envelope.id
    known["delivery_mode"] = 2
    # The broker refuses a user_id that is not the connection's own.
    known.pop("user_id", None)
    return known


def _packed(headers: Mapping[str, Any]) -> bytes:
    table: bytes = dumps("F", [headers])
    return table


def _short(text: str) -> bytes:
    data = text.encode()
    return bytes((len(data),)) + data
