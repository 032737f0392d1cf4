from __future__ import annotations

from amqp import spec
from amqp.serialization import loads
from hypothesis import given
from hypothesis import strategies as st

from kq.backends.rabbitmq_acknowledgement import acknowledgements, rejections
from tests.unit.amqp_frames import CHANNEL, split

TAGS = st.integers(1, 2**63 - 1)


def methods(data: bytes) -> list[tuple[tuple[int, int], int, bool]]:
    """Return method, tag and bit of each frame, as py-amqp reads them."""
    found = []
    for kind, channel, payload in split(data):
        assert (kind, channel) == (1, CHANNEL)
        (class_id, method_id, tag, bit), end = loads("BBLb", payload, 0)
        assert end == len(payload)
        found.append(((class_id, method_id), tag, bit))
    return found


@given(TAGS | st.just(0), st.lists(TAGS, max_size=5))
def test_acknowledgements(up_to: int, tags: list[int]) -> None:
    """One frame for all up to a tag, where there are such, and one for each other."""
    expected = [(spec.Basic.Ack, tag, False) for tag in tags]
    if up_to:
        expected.insert(0, (spec.Basic.Ack, up_to, True))
    assert methods(acknowledgements(CHANNEL, up_to, tags)) == expected


@given(st.lists(TAGS, max_size=5))
def test_rejections(tags: list[int]) -> None:
    """Each goes back to its queue."""
    assert methods(rejections(CHANNEL, tags)) == [(spec.Basic.Reject, tag, True) for tag in tags]
