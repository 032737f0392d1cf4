from __future__ import annotations

from typing import Any

from amqp.serialization import loads
from hypothesis import given
from hypothesis import strategies as st

from kq.backends.rabbitmq_publication import Writer
from kq.backends.rabbitmq_topology import to_envelope, without_history
from kq.envelope import Envelope
from tests.unit.amqp_frames import CHANNEL, FRAME_MAX, read, split, written

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALARS = TEXT | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.none() | st.floats(allow_nan=False)
HEADERS = st.dictionaries(TEXT, SCALARS | st.lists(SCALARS, max_size=3))
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": TEXT, "content_encoding": TEXT, "priority": st.integers(0, 9), "correlation_id": TEXT,
        "reply_to": TEXT, "timestamp": st.integers(0, 2**40), "type": TEXT, "app_id": TEXT,
    },
)  # fmt: skip


@given(TEXT.filter(bool), HEADERS, PROPERTIES, st.binary(max_size=3 * FRAME_MAX))
def test_py_amqp_reads_what_is_written(
    id: str, headers: dict[str, Any], properties: dict[str, Any], body: bytes
) -> None:
    """Id, headers, properties and body travel as AMQP has them, and persistently; large bodies in several frames."""
    writer = Writer(CHANNEL, FRAME_MAX)
    for _ in range(2):
        # The second time headers come from memory.
        found = to_envelope(read(written(Envelope(id, headers, properties, body), writer=writer)))
        assert (found.id, found.body) == (id, body)
        assert found.properties == {**properties, "delivery_mode": 2}
        # What the broker itself notes there is not published.
        kept = without_history(headers)
        assert found.headers == kept
        assert [type(value) for value in found.headers.values()] == [type(value) for value in kept.values()]


@given(TEXT, TEXT)
def test_it_goes_where_it_is_sent(exchange: str, routing_key: str) -> None:
    """To an exchange, under a key, on the channel, and comes back if no queue takes it."""
    frames = split(written(Envelope("a", {}, {}, b"x"), exchange, routing_key))
    assert [(kind, channel) for kind, channel, _ in frames] == [(1, CHANNEL), (2, CHANNEL), (3, CHANNEL)]
    (_, to, key, mandatory, immediate), _ = loads("Bssbb", frames[0][2], 4)
    assert (to, key, mandatory, immediate) == (exchange, routing_key, True, False)


def test_headers_that_look_alike_are_not_mixed_up() -> None:
    """What is remembered of headers tells 1 from True."""
    writer = Writer(CHANNEL, FRAME_MAX)
    for value in (1, True, 1.0, 1):
        found = to_envelope(read(written(Envelope("a", {"x": value}, {}, b""), writer=writer)))
        assert type(found.headers["x"]) is type(value)


def test_rabbitmqs_own_history_is_not_sent_on() -> None:
    """What RabbitMQ says of a message's past is left out, and nobody's user id is claimed."""
    envelope = Envelope(
        "m-1", {"a": 1, "x-death": [], "x-first-death-queue": "q", "x-delivery-count": 2}, {"user_id": "u"}, b""
    )
    message = read(written(envelope))
    assert message.headers == {"a": 1}
    assert "user_id" not in message.properties
