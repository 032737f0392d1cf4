"""RabbitMQ: queues that cannot be consumed, and messages that come back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from queue import Queue as Arrivals
from threading import Thread
from time import monotonic
from typing import Any

import amqp
import pytest

from kq.backend import Delivery, Feed, Publication, Settlement
from kq.backends import rabbitmq_aside
from kq.backends.rabbitmq_feed import RabbitFeed
from kq.config import Settings
from kq.driver import Driver
from kq.errors import Error, NotFound
from kq.fetcher import Fetcher
from kq.outcome import DONE, RELEASE, Outcome
from kq.scheme import open_backend
from tests.account import account
from tests.broker import AMQP_URL, amqp_channel
from tests.conformance.conftest import ON_RABBITMQ, Bench
from tests.proxy import Proxy


def take(bench: Bench, feed: Feed, count: int, within: float = 15.0) -> list[Delivery]:
    """Fetch as a worker does, which goes on after an error."""
    found: list[Delivery] = []
    until = monotonic() + within
    while len(found) < count and monotonic() < until:
        try:
            found += feed.fetch(count - len(found), {})
            if len(found) < count:
                feed.wait(0.2)
        except Error:
            continue
    return found


def break_link(feed: Feed) -> None:
    """Have a feed's connection break under it."""
    assert isinstance(feed, RabbitFeed)
    assert feed._link is not None
    feed._link.connection.sock.shutdown(2)
    while feed._link is not None:
        with suppress(Error):
            feed.wait(5.0)
            assert feed.fetch(1, {}) == []


@ON_RABBITMQ
@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_queues_that_another_one_has_for_itself_keep_nobody_from_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They are served at once; and so are those, in their order and uncharged, once they can be."""
    monkeypatch.setattr(rabbitmq_aside, "AGAIN", 0.2)
    others = [bench.declare(f"other{n}", options={"amqp": {"queue_type": kind}}) for n in range(2)]
    arrived = Arrivals[Delivery]()

    def note(deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            arrived.put(delivery)

    fetcher = Fetcher(
        bench.backend, [bench.queue, *others], driver=Driver(bench.broker.url), prefetch=20, lease=600,
        on_deliveries=note,
    )  # fmt: skip
    with amqp_channel() as channel:
        for other in others:
            channel.basic_consume(other.id, callback=lambda message: None, exclusive=True)
        fetcher.hold(20)
        fetcher.start()
        try:
            bench.publish(bench.message("a"), bench.message("b"))
            assert [arrived.get(timeout=10).id for _ in range(2)] == ["a", "b"]
            channel.connection.close()
            bench.publish(*[bench.message(f"{n}-{other.id}", queue=other) for n in range(3) for other in others])
            found = [arrived.get(timeout=10) for _ in range(6)]
        finally:
            fetcher.stop(10)
    for other in others:
        assert [delivery.id[0] for delivery in found if delivery.queue == other.id] == ["0", "1", "2"]
    assert [delivery.deliveries for delivery in found] == [0] * 6


@ON_RABBITMQ
def test_what_a_look_at_a_queue_brings_is_told(bench: Bench) -> None:
    """The broker counts it as delivered, and the queue is as it was."""
    bench.publish(bench.message("a"), bench.message("b"))
    backend: Any = bench.backend

    assert backend._administer(lambda link: rabbitmq_aside.probe(link, bench.queue.id)) == ["a"]

    with pytest.raises(NotFound):
        backend._administer(lambda link: rabbitmq_aside.probe(link, f"{bench.queue.id}-none"))
    assert [delivery.id for delivery in bench.take(bench.feed(), 2)] == ["a", "b"]


@ON_RABBITMQ
def test_a_queue_that_is_gone_and_cannot_be_made_keeps_nobody_from_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An account need not be allowed to declare; somebody else makes the queue in the end."""
    monkeypatch.setattr(rabbitmq_aside, "AGAIN", 0.2)
    other = bench.declare("other")
    with account(bench.broker, lambda _: [["^$", ".*", ".*"]]) as url:
        backend = open_backend(Settings(broker=url), "test")
        with closing(backend), closing(backend.feed([bench.queue, other], 10)) as feed:
            bench.publish(bench.message("a"))
            (first,) = take(bench, feed, 1)
            assert feed.settle([Settlement(first, DONE)]) == ([], [])
            bench.delete(other.id)
            bench.publish(bench.message("b"))
            assert "b" in [delivery.id for delivery in take(bench, feed, 1)]
            bench.backend.declare(other, create=True, exact=True)
            bench.publish(bench.message("c", queue=other))
            assert [delivery.id for delivery in take(bench, feed, 1)] == ["c"]


@ON_RABBITMQ
def test_a_message_without_an_id_comes_back_under_the_one_it_was_given(bench: Bench) -> None:
    """As the same delivery, so that who runs it knows it; one that is like it has another id."""
    with amqp_channel() as channel:
        for body in (b'{"n":1}', b'{"n":1}', b'{"n":2}'):
            channel.basic_publish(amqp.Message(body, content_type="application/json"), routing_key=bench.queue.id)
    feed = bench.feed()
    before = bench.take(feed, 3)
    assert len({delivery.id for delivery in before}) == 3

    break_link(feed)
    after = take(bench, feed, 3)

    assert all(delivery.lost for delivery in before)
    assert {(delivery.id, delivery.raw) for delivery in after} == {(delivery.id, delivery.raw) for delivery in before}
    assert all(delivery.deliveries == 0 for delivery in after)


@ON_RABBITMQ
def test_what_is_like_what_was_done_comes_back(bench: Bench) -> None:
    """Two messages of one id that say the same: one is done when the connection breaks, the other one waits here."""
    feed = bench.feed()
    message = bench.message("order-42")
    bench.publish(message, message)
    first, second = bench.take(feed, 2)
    assert feed.settle([Settlement(first, DONE)]) == ([], [])
    # Which asks the broker, behind that.
    feed.put_back()

    break_link(feed)
    (again,) = take(bench, feed, 1)

    assert second.lost
    assert (again.id, again.raw) == (second.id, second.raw)
    assert feed.settle([Settlement(again, DONE)]) == ([], [])
    assert bench.backend.info(bench.queue).message_count == 0


@ON_RABBITMQ
def test_what_another_one_gives_back_is_not_taken_for_what_was_done(bench: Bench) -> None:
    """It has the same id and says the same, and comes as one that was delivered before."""
    feed = bench.feed()
    for _ in range(2):
        message = bench.message("order-42")
        bench.publish(message)
        (delivery,) = bench.take(feed, 1)
        assert feed.settle([Settlement(delivery, DONE)]) == ([], [])
    assert feed.fetch(0, {}) == []
    feed.put_back()
    other = bench.feed()
    bench.publish(message)
    (elsewhere,) = bench.take(other, 1)
    assert other.settle([Settlement(elsewhere, RELEASE)]) == ([], [])
    other.close()

    (again,) = bench.take(feed, 1)
    assert (again.id, again.raw) == ("order-42", delivery.raw)


@ON_RABBITMQ
def test_a_classic_queue_s_message_comes_back_to_whoever_lost_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, not as a copy that another worker might get while it runs here."""
    queue = bench.declare("classic", options={"amqp": {"queue_type": "classic"}})
    feed = bench.feed(queue)
    bench.publish(bench.message("a", queue=queue))
    (before,) = bench.take(feed, 1)
    published: list[Any] = []
    assert isinstance(feed, RabbitFeed)
    publish = feed._copies._courier.publish

    def publish_and_note(batch: Sequence[Publication]) -> list[Error | None]:
        published.append(batch)
        return publish(batch)

    monkeypatch.setattr(feed._copies._courier, "publish", publish_and_note)

    for _ in range(3):
        break_link(feed)
        (after,) = take(bench, feed, 1)
        assert (after.id, after.raw, after.deliveries) == ("a", before.raw, 0)
    assert published == []

    # What was lost elsewhere is counted, and by a copy, for the broker does not count.
    other = bench.feed(queue)
    bench.abandon(feed)
    (counted,) = bench.take(other, 1)
    assert counted.deliveries == 1


@ON_RABBITMQ
def test_what_an_alarm_holds_up_is_stored_once(bench: Bench) -> None:
    """A retry and a dead letter that were written when RabbitMQ blocked the connection are stored when that is over."""
    with closing(Proxy(AMQP_URL)) as proxy, closing(open_backend(Settings(broker=proxy.url), "test")) as backend:
        bench.publish(*(bench.message(f"m-{n}") for n in range(4)))
        feed = backend.feed([bench.queue], 100)
        try:
            at_once, later, dead, unwritten = bench.take(feed, 4)
            first = [
                Settlement(at_once, Outcome("retry", 0.0, 1)),
                Settlement(later, Outcome("retry", 0.01, 1)),
                Settlement(dead, Outcome("dead", 0.0, 1, 0, "not_retryable")),
            ]
            proxy.raise_alarm()
            for settlements in (first, [*first, Settlement(unwritten, Outcome("retry", 0.0, 1))]):
                late, failed = feed.settle(settlements)
                assert late == []
                assert [error.details["reason"] for _, error in failed] == ["blocked"] * len(settlements)

            proxy.end_alarm()
            until = monotonic() + 15.0
            left = [settlement for settlement, _ in failed]
            while left and monotonic() < until:
                late, failed = feed.settle(left)
                assert late == []
                left = [settlement for settlement, _ in failed]
            assert left == []
            again = bench.take(feed, 4, within=2.0)
            assert sorted((delivery.id, delivery.attempts) for delivery in again) == [
                (delivery.id, 1) for delivery in (at_once, later, unwritten)
            ]
            assert feed.settle([Settlement(delivery, DONE) for delivery in again]) == ([], [])
        finally:
            feed.close()
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == [dead.id]


@ON_RABBITMQ
def test_what_an_alarm_held_up_is_told_as_it_ended(bench: Bench) -> None:
    """Where a dead-letter queue is deleted meanwhile, the letter comes back, and is published once more."""
    with closing(Proxy(AMQP_URL)) as proxy, closing(open_backend(Settings(broker=proxy.url), "test")) as backend:
        bench.publish(bench.message("a"))
        feed = backend.feed([bench.queue], 100)
        try:
            (delivery,) = bench.take(feed, 1)
            dead = Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable"))
            proxy.raise_alarm()
            assert [error.details["reason"] for _, error in feed.settle([dead]).failed] == ["blocked"]
            bench.delete(bench.dead.id)
            proxy.end_alarm()
            until = monotonic() + 15.0
            while feed.settle([dead]).failed and monotonic() < until:
                pass
        finally:
            feed.close()
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["a"]
    assert bench.backend.info(bench.queue).ready == 0


@ON_RABBITMQ
def test_what_an_alarm_holds_up_is_not_given_back_again(bench: Bench) -> None:
    """What waits here unasked for goes back by a copy where returns are counted: by one, however often it is tried."""
    queue = bench.declare("classic", options={"amqp": {"queue_type": "classic"}})
    with closing(Proxy(AMQP_URL)) as proxy, closing(open_backend(Settings(broker=proxy.url), "test")) as backend:
        feed = backend.feed([queue], 100)
        assert isinstance(feed, RabbitFeed)
        try:
            assert feed.fetch(3, {}) == []
            bench.publish(*(bench.message(f"m-{n}", queue=queue) for n in range(3)))
            until = monotonic() + 15.0
            while len(feed._outstanding) < 3 and monotonic() < until:
                feed.wait(0.1)
            (delivery,) = feed.fetch(1, {})
            assert len(feed._outstanding) == 3
            proxy.raise_alarm()
            for _ in range(3):
                feed.put_back()
            # On their way: nobody is to run them here.
            assert feed.fetch(10, {}) == []
            proxy.end_alarm()
            while len(feed._outstanding) > 1 and monotonic() < until:
                feed.fetch(0, {})
            assert feed.settle([Settlement(delivery, DONE)]) == ([], [])
            again = bench.take(feed, 3, within=2.0)
            assert sorted(one.id for one in again) == sorted({"m-0", "m-1", "m-2"} - {delivery.id})
            assert feed._copies._courier._lane is None
        finally:
            feed.close()


@ON_RABBITMQ
@pytest.mark.parametrize("patience", [60.0, 0.2])
def test_what_an_alarm_holds_up_is_waited_for_at_the_end(bench: Bench, patience: float) -> None:
    """What goes back by a copy is not given back as well: as long as there is time, and no longer."""
    queue = bench.declare("classic", options={"amqp": {"queue_type": "classic"}})
    settings = Settings(broker="", heartbeat=1.0)
    with closing(Proxy(AMQP_URL)) as proxy, closing(open_backend(settings, "test", Driver(proxy.url))) as backend:
        feed = backend.feed([queue], 100)
        assert isinstance(feed, RabbitFeed)
        assert feed.fetch(1, {}) == []
        bench.publish(bench.message("a", queue=queue))
        until = monotonic() + 15.0
        while not feed._outstanding and monotonic() < until:
            feed.wait(0.1)
            feed._connected().drain_all()
        proxy.raise_alarm()
        feed.put_back()
        assert len(feed._onward) == 1
        closer = Thread(target=feed.close, args=[patience])
        closer.start()
        # Longer than a broker may be silent.
        closer.join(4.0 if patience > 1.0 else 15.0)
        assert closer.is_alive() == (patience > 1.0)
        proxy.end_alarm()
        closer.join(15.0)
        assert not closer.is_alive()
    if patience > 1.0:
        assert bench.backend.info(queue).ready == 1
        (back,) = bench.take(bench.feed(queue), 1)
        assert back.id == "a"
