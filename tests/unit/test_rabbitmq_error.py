from __future__ import annotations

from typing import Any

import pytest
from amqp.exceptions import NotAllowed
from amqp.transport import TCPTransport

from kq.backends.rabbitmq_error import RabbitErrors
from kq.errors import Internal, PermissionDenied

ERRORS = RabbitErrors("amqp://guest:secret@127.0.0.1")


@pytest.mark.parametrize("lost", [None, TCPTransport("127.0.0.1")], ids=["taken away", "ended"])
def test_a_connection_that_has_ended_is_a_broker_that_is_away(lost: Any) -> None:
    """Also where py-amqp goes on using what it has taken away from it."""
    with pytest.raises(Internal) as caught, ERRORS:
        lost.read_frame()

    assert caught.value.details["reason"] == "unavailable"


def test_a_limit_of_connections_is_no_lack_of_permission() -> None:
    """What a handler publishes meanwhile is worth another try."""
    text = "access to vhost '/' refused for user 'guest': connection limit (3) is reached"
    with pytest.raises(Internal) as caught, ERRORS:
        raise NotAllowed(text, (10, 40), "Connection.open")

    assert caught.value.retryable
    assert "connection limit (3)" in caught.value.message
    with pytest.raises(PermissionDenied), ERRORS:
        raise NotAllowed("access to vhost 'unlimited' refused for user 'guest'", (10, 40), "Connection.open")


def test_a_mistake_of_ours_is_no_broker_that_is_away() -> None:
    """An attribute that is missing elsewhere is shown as what it is, not tried again for ever."""
    ours: Any = object()
    with pytest.raises(AttributeError), ERRORS:
        ours.read_frame()
