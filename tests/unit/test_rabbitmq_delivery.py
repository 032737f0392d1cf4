from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from struct import pack
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from amqp import spec
from amqp.exceptions import UnexpectedFrame
from amqp.serialization import dumps, loads
from hypothesis import given
from hypothesis import strategies as st

from kq.backends.rabbitmq_delivery import Deliveries, plain_table
from kq.backends.rabbitmq_topology import to_envelope
from kq.envelope import Envelope

CHANNEL = 1
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALARS = st.one_of(
    TEXT, st.integers(-(2**31), 2**31 - 1), st.booleans(), st.none(), st.floats(allow_nan=False),
    st.binary(max_size=20), st.decimals(-100, 100, places=2),
    st.integers(0, 2**31).map(lambda second: datetime.fromtimestamp(second, timezone.utc)),
)  # fmt: skip
HEADERS = st.dictionaries(
    TEXT, st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
)
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": TEXT, "content_encoding": TEXT, "delivery_mode": st.integers(1, 2),
        "priority": st.integers(0, 255), "correlation_id": TEXT, "reply_to": TEXT, "expiration": TEXT,
        "message_id": TEXT.filter(bool), "timestamp": st.integers(0, 2**40), "type": TEXT, "user_id": TEXT,
        "app_id": TEXT, "cluster_id": TEXT,
    },
)  # fmt: skip


class Wire:
    """A connection as far as frames are concerned, and what came out of it."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, bool, Envelope]] = []
        self.others: list[tuple[Any, ...]] = []
        self.connection = SimpleNamespace(bytes_recv=0)
        self.deliveries = Deliveries()
        self.deliveries.receivers[CHANNEL, "kq-1"] = self._receive
        self.on_frame: Callable[[Any], Any] = self.deliveries.frame_handler(
            self.connection, lambda *call: self.others.append(call)
        )

    def _receive(self, tag: int, redelivered: bool, envelope: Envelope, body: list[bytes]) -> None:
        assert envelope.body == b""
        envelope.body = b"".join(body)
        self.arrived.append((tag, redelivered, envelope))

    def deliver(self, header: bytes, *bodies: bytes, tag: int = 7, consumer: str = "kq-1", flag: int = 0) -> list[Any]:
        """Feed a delivery, and return what each frame was answered with."""
        return [self.on_frame(frame) for frame in frames(header, *bodies, tag=tag, consumer=consumer, flag=flag)]


def frames(
    header: bytes, *bodies: bytes, tag: int = 7, consumer: str = "kq-1", flag: int = 0, channel: int = CHANNEL
) -> list[tuple[int, int, bytes]]:
    """Return the frames of a delivery."""
    name = consumer.encode()
    method = pack(">HHB", 60, 60, len(name)) + name + pack(">QB", tag, flag) + b"\x00" + b"\x05app:q"
    return [(1, channel, method), (2, channel, header), *((3, channel, body) for body in bodies)]


def header_of(size: int, headers: dict[str, Any] | None = None, **properties: Any) -> bytes:
    """Return a content header as py-amqp writes it."""
    message = amqp.Message(b"", application_headers=headers, **properties)
    written: bytes = message._serialize_properties()
    return pack(">HHQ", 60, 0, size) + written


@given(HEADERS, PROPERTIES, st.binary(max_size=50))
def test_it_reads_what_py_amqp_reads(headers: dict[str, Any], properties: dict[str, Any], body: bytes) -> None:
    """Whatever py-amqp can write and read again, arrives as it would have by way of py-amqp."""
    try:
        raw = header_of(len(body), headers, **properties)
    except Exception:
        return  # nothing that py-amqp can write
    wire = Wire()
    for _ in range(2):
        # The second one's headers come from memory.
        wire.deliver(raw, *([body] if body else []))
    expected = amqp.Message(b"")
    expected.inbound_header(raw)
    expected.body = body
    wanted = to_envelope(expected)
    for tag, redelivered, envelope in wire.arrived:
        assert (tag, redelivered) == (7, False)
        if "message_id" not in properties:
            assert envelope.id == ""
            envelope.id = wanted.id
        assert envelope == wanted
    assert len(wire.arrived) == 2
    assert wire.others == []


def test_a_body_comes_in_pieces() -> None:
    """A large message is whole once its last piece is there; every frame counts as a sign of life."""
    wire = Wire()
    answers = wire.deliver(header_of(6, message_id="a"), b"ab", b"cd", b"ef", flag=1)
    assert answers == [False, False, False, False, True]
    ((tag, redelivered, envelope),) = wire.arrived
    assert (tag, redelivered, envelope.id, envelope.body) == (7, True, "a", b"abcdef")
    assert wire.connection.bytes_recv == 5


def test_what_is_remembered_of_headers_is_nobodys_to_change() -> None:
    """Headers that came before are equal and not the same."""
    wire = Wire()
    raw = header_of(0, {"x_kq": 1}, message_id="a")
    wire.deliver(raw)
    wire.arrived[0][2].headers["x_kq"] = 2
    wire.deliver(raw)
    assert wire.arrived[1][2].headers == {"x_kq": 1}


def test_others_go_to_py_amqp() -> None:
    """Deliveries of unknown subscriptions, and everything that is no delivery, take py-amqp's way."""
    wire = Wire()
    wire.deliver(header_of(1), b"x", consumer="other")
    wire.on_frame((1, CHANNEL, pack(">HH", 60, 80)))
    assert [call[1] for call in wire.others] == [spec.Basic.Deliver, spec.Basic.Ack]
    assert wire.arrived == []


def test_channels_do_not_mix() -> None:
    """A delivery on one channel may come in the middle of another one's."""
    wire = Wire()
    wire.deliveries.receivers[2, "kq-1"] = wire.deliveries.receivers[CHANNEL, "kq-1"]
    first = frames(header_of(1, message_id="first"), b"1")
    second = frames(header_of(1, message_id="second"), b"2", channel=2)
    for frame in (first[0], second[0], first[1], second[1], second[2], first[2]):
        wire.on_frame(frame)
    assert [(envelope.id, envelope.body) for _, _, envelope in wire.arrived] == [("second", b"2"), ("first", b"1")]


def test_a_broken_order_is_an_error() -> None:
    """What comes in the middle of a delivery and is no part of it breaks the connection, as everywhere in AMQP."""
    wire = Wire()
    method, header, _ = frames(header_of(1), b"x")
    wire.on_frame(method)
    with pytest.raises(UnexpectedFrame):
        wire.on_frame((3, CHANNEL, b"x"))
    wire = Wire()
    wire.on_frame(method)
    wire.on_frame(header)
    with pytest.raises(UnexpectedFrame):
        wire.on_frame(method)


@given(st.binary(max_size=80), st.integers(0, 0xFFFF))
def test_nonsense_is_served(rest: bytes, flags: int) -> None:
    """Whatever properties a stranger writes, the message arrives with its body."""
    wire = Wire()
    wire.deliver(pack(">HHQH", 60, 0, 1, flags & ~1) + rest, b"x")
    ((_, _, envelope),) = wire.arrived
    assert envelope.body == b"x"
    envelope.id.encode()


def test_text_that_is_no_utf_8_is_escaped() -> None:
    """In properties and in headers, names as well."""
    wire = Wire()
    table = dumps("F", [{"ok": 1, "date": datetime(2020, 1, 1, tzinfo=timezone.utc), "much": Decimal("1.5")}])
    broken = table.replace(b"ok", b"\xff\xfe")
    raw = pack(">HHQH", 60, 0, 0, 1 << 15 | 1 << 13 | 1 << 7) + b"\x02\xff\xfe" + broken + b"\x01\xff"
    wire.deliver(raw)
    ((_, _, envelope),) = wire.arrived
    assert envelope.properties == {"content_type": "\\xff\\xfe"}
    assert envelope.id == "\\xff"
    assert all(isinstance(key, str) for key in envelope.headers)


ASCII = st.text(st.characters(max_codepoint=127), max_size=60)
PLAIN = st.one_of(
    ASCII, st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none(),
    st.floats(allow_nan=False),
)  # fmt: skip


@given(st.dictionaries(ASCII, PLAIN, max_size=40))
def test_plain_tables_are_read_as_py_amqp_reads_them(headers: dict[str, Any]) -> None:
    """And of the same types."""
    raw = dumps("F", [headers])
    found = plain_table(raw)
    assert found is not None
    expected = loads("F", raw, 0)[0][0]
    assert list(map(repr, found.items())) == list(map(repr, expected.items()))


def test_deaths_are_passed_over() -> None:
    """What RabbitMQ says of a delay is left out; what stands behind it is read."""
    at = datetime.now(timezone.utc)
    deaths = [{"count": 3, "reason": "expired", "queue": "kq.delay.50", "routing-keys": ["app:q"], "time": at}]
    raw = dumps("F", [{"x_kq": 1, "x-death": deaths, "x-first-death-reason": "expired", "x_due_at": 1.5}])

    assert plain_table(raw) == {"x_kq": 1, "x-first-death-reason": "expired", "x_due_at": 1.5}
    for cut in range(1, len(raw)):
        plain_table(raw[:cut])


@given(HEADERS, st.binary(max_size=5), st.integers(0, 5))
def test_other_tables_are_left_to_py_amqp(headers: dict[str, Any], tail: bytes, cut: int) -> None:
    """What is cut off, goes on or holds more than text and numbers is not read wrongly, and raises nothing."""
    raw = dumps("F", [headers])
    raw = raw[: len(raw) - cut] + tail
    found = plain_table(raw)
    if found is not None and raw[:4] == (len(raw) - 4).to_bytes(4, "big"):
        assert list(map(repr, found.items())) == list(map(repr, loads("F", raw, 0)[0][0].items()))


def test_tables_are_remembered_up_to_a_size() -> None:
    """However many there are and however large; each message has its own headers all the same."""
    wire = Wire()
    large = {f"header-{n}": "x" * 20 for n in range(30)}
    sent = [{**large, "number": n % 400} for n in range(1000)]
    sent += [{"body": "y" * 5000}] * 3
    for headers in sent:
        wire.deliver(header_of(1, headers), b"b")
        wire.arrived[-1][2].headers["mine"] = True

    assert [envelope.headers for _, _, envelope in wire.arrived] == [{**headers, "mine": True} for headers in sent]
    tables = wire.deliveries._tables
    assert 1 < len(tables) < 400
    assert 0 < sum(map(len, tables)) <= wire.deliveries._tables_bytes <= 2**18
