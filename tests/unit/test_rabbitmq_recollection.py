"""What a feed knows of messages that come back after its connection broke."""

from __future__ import annotations

from kq.backend import Delivery
from kq.backends.rabbitmq_recollection import Recollection


def delivery(id: str = "a", raw: bytes = b"raw", queue: str = "app:q") -> Delivery:
    """Return a delivery."""
    return Delivery(queue, id, raw, 0, 0, 0, None)


def test_this_very_message_is_done() -> None:
    """Queue, id and bytes must be the same: a retry, or another message under the id, is not done."""
    recollection = Recollection()
    recollection.done(delivery())

    assert recollection.is_done(delivery())
    assert not recollection.is_done(delivery(raw=b"other"))
    assert not recollection.is_done(delivery(id="b"))
    assert not recollection.is_done(delivery(queue="app:r"))


def test_losses_add_up_until_the_message_is_done() -> None:
    """Each connection that broke with a message in hand counts, until it has been handled."""
    recollection = Recollection()
    recollection.went_back(delivery())
    recollection.went_back(delivery())
    assert recollection.losses("app:q", "a") == 2

    recollection.done(delivery())
    assert recollection.losses("app:q", "a") == 0


def test_a_copy_begins_at_nothing() -> None:
    """Of what takes a message's place the broker has counted nothing that could be taken off."""
    recollection = Recollection()
    recollection.went_back(delivery())
    recollection.copied(delivery())

    assert recollection.losses("app:q", "a") == 0


def test_what_was_said_too_early_is_taken_back() -> None:
    """A message whose early acknowledgement failed, and that nobody has seen, runs when it comes back."""
    recollection = Recollection()
    recollection.done(delivery())
    recollection.not_done(delivery())

    assert not recollection.is_done(delivery())


def test_memory_is_bounded() -> None:
    """The latest are remembered, however many there were."""
    recollection = Recollection()
    for n in range(20_000):
        recollection.done(delivery(id=str(n)))
        recollection.went_back(delivery(id=f"lost {n}"))

    assert recollection.is_done(delivery(id="19999"))
    assert not recollection.is_done(delivery(id="0"))
    assert recollection.losses("app:q", "lost 19999") == 1
    assert recollection.losses("app:q", "lost 0") == 0
