"""What a feed knows of messages that come back after its connection broke."""

from __future__ import annotations

from typing import Any

from kq.backend import Delivery
from kq.backends.rabbitmq_recollection import Named, Recollection
from kq.envelope import Envelope


def delivery(id: str = "a", raw: bytes = b"raw", queue: str = "app:q") -> Delivery:
    """Return a delivery."""
    return Delivery(queue, id, raw, 0, 0, 0, None)


def test_this_very_message_is_done() -> None:
    """Queue, id and bytes must be the same: a retry, or another message under the id, is not done."""
    recollection = Recollection()
    recollection.done(delivery(), 1, 0.0)

    assert recollection.is_done(delivery(), 2, 1.0)
    assert not recollection.is_done(delivery(raw=b"other"), 2, 1.0)
    assert not recollection.is_done(delivery(id="b"), 2, 1.0)
    assert not recollection.is_done(delivery(queue="app:r"), 2, 1.0)


def test_over_the_same_connection_it_is_another_message() -> None:
    """No acknowledgement gets lost there: an equal one under the same id, which somebody else has given back."""
    recollection = Recollection()
    recollection.done(delivery(), 2, 0.0)

    assert not recollection.is_done(delivery(), 2, 1.0)
    assert recollection.is_done(delivery(), 3, 1.0)
    recollection.is_another("app:q", "a")
    assert not recollection.is_done(delivery(), 3, 1.0)


def test_losses_of_an_earlier_copy_are_not_those_of_a_new_one() -> None:
    """The broker begins to count anew."""
    recollection = Recollection()
    assert not recollection
    recollection.went_back("app:q", "a")
    assert recollection
    recollection.is_another("app:q", "a")

    assert recollection.losses("app:q", "a") == 0


def test_what_was_acknowledged_long_before_is_known_to_the_broker() -> None:
    """What comes under its id after a connection broke is another message."""
    recollection = Recollection()
    recollection.done(delivery(id="old"), 1, 0.0)
    recollection.done(delivery(id="new"), 1, 200.0)
    recollection.broke(210.0)

    assert not recollection.is_done(delivery(id="old"), 2, 210.0)
    assert recollection.is_done(delivery(id="new"), 2, 210.0)
    # However long the broker was away.
    recollection.connected(5000.0)
    assert recollection.is_done(delivery(id="new"), 2, 5010.0)
    assert not recollection.is_done(delivery(id="new"), 2, 5700.0)


def test_what_had_no_id_comes_back_under_the_one_that_it_was_given() -> None:
    """Of several that are alike each has one of its own, and what was not lost gets a new one."""
    named = Named()
    for id, body in (("one", b"same"), ("two", b"same"), ("three", b"other")):
        named.remember("app:q", Envelope(id, {"h": 1}, {"priority": 4}, body))

    def again(body: bytes, queue: str = "app:q", headers: dict[str, Any] | None = None) -> str:
        return named.again(queue, Envelope("", headers or {"h": 1}, {"priority": 4}, b""), body)

    assert len(again(b"same", queue="app:r")) == 32
    assert len(again(b"same", headers={"h": 2})) == 32
    assert [again(b"same"), again(b"other"), again(b"same")] == ["one", "three", "two"]
    assert len({again(b"same"), again(b"same")} - {"one", "two"}) == 2


def test_the_id_of_what_has_been_settled_is_not_given_again() -> None:
    """It may have gone to another worker: what comes here is another message that is like it."""
    named = Named()
    for id in ("one", "two"):
        named.remember("app:q", Envelope(id, {}, {}, b"same"))
    named.forget("one")
    named.forget("unknown")

    assert named.again("app:q", Envelope("", {}, {}, b""), b"same") == "two"
    assert len(named.again("app:q", Envelope("", {}, {}, b""), b"same")) == 32


def test_given_ids_are_bounded() -> None:
    """The latest are remembered, also of those that are alike."""
    named = Named()
    for n in range(20_000):
        named.remember("app:q", Envelope(str(n), {}, {}, b"same"))

    assert int(named.again("app:q", Envelope("", {}, {}, b""), b"same")) >= 10_000


def test_losses_add_up_until_the_message_is_done() -> None:
    """Each connection that broke with a message in hand counts, until it has been handled."""
    recollection = Recollection()
    recollection.went_back("app:q", "a")
    recollection.went_back("app:q", "a")
    assert recollection.losses("app:q", "a") == 2

    recollection.done(delivery(), 1, 0.0)
    assert recollection.losses("app:q", "a") == 0


def test_a_copy_begins_at_nothing() -> None:
    """Of what takes a message's place the broker has counted nothing that could be taken off."""
    recollection = Recollection()
    recollection.went_back("app:q", "a")
    recollection.copied(delivery())

    assert recollection.losses("app:q", "a") == 0


def test_what_was_said_too_early_is_taken_back() -> None:
    """A message whose early acknowledgement failed, and that nobody has seen, runs when it comes back."""
    recollection = Recollection()
    recollection.done(delivery(), 1, 0.0)
    recollection.not_done(delivery())

    assert not recollection.is_done(delivery(), 2, 1.0)


def test_memory_is_bounded() -> None:
    """The latest are remembered, however many there were."""
    recollection = Recollection()
    for n in range(20_000):
        recollection.done(delivery(id=str(n)), 1, 0.0)
        recollection.went_back("app:q", f"lost {n}")

    assert recollection.is_done(delivery(id="19999"), 2, 1.0)
    assert not recollection.is_done(delivery(id="0"), 2, 1.0)
    assert recollection.losses("app:q", "lost 19999") == 1
    assert recollection.losses("app:q", "lost 0") == 0
