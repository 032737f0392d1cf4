"""What comes to a feed that waits: it may be this feed's already, and is nobody's loss if it stops now."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
import redis

from kq.backend import Delivery, Feed, Settlement
from kq.backends.redis_key import prefix
from kq.backends.store import TAKE_MOST, BrokerAway
from kq.backends.stored import StoredBackend
from kq.backends.stored_feed import StoredFeed
from kq.errors import Error
from kq.outcome import DONE, Outcome
from tests.account import account
from tests.broker import Broker
from tests.conformance.conftest import ON_REDIS, ON_STORES, Bench
from tests.conformance.test_acl import printed


def wait(feed: Feed, credit: int = 5) -> None:
    """Fetch nothing, and wait for a moment; what has been asked of the broker goes on."""
    assert feed.fetch(credit, {}) == []
    feed.wait(0.05)


def charge(bench: Bench) -> int:
    """Return how many deliveries a message has on its account that was given back: RabbitMQ itself counts one."""
    return 1 if bench.broker.name == "rabbitmq" else 0


def test_what_came_meanwhile_is_put_back(bench: Bench) -> None:
    """In order, and with no charge, for whoever fetches next."""
    feed = bench.feed()
    wait(feed)
    bench.publish(bench.message("a"), bench.message("b"))

    feed.put_back()

    deliveries = bench.take(bench.feed(), 2)
    assert [delivery.id for delivery in deliveries] == ["a", "b"]
    assert all(delivery.deliveries <= charge(bench) for delivery in deliveries)


@ON_STORES
def test_what_is_due_later_is_heard_of(bench: Bench) -> None:
    """Whoever waits for something else learns when it will be due, and does not only look now and then."""
    feed = bench.feed()
    wait(feed)
    bench.publish(bench.message("a", delay=0.3))

    assert [delivery.id for delivery in bench.take(feed, 1, within=2.5)] == ["a"]


@ON_STORES
def test_what_a_full_queue_has_taken_is_heard_of(bench: Bench) -> None:
    """Also where it has taken only some of what was published at once."""
    bench.queue = bench.declare("small", max_length=3)
    feed = bench.feed()
    wait(feed)
    errors = bench.backend.publish([bench.message() for _ in range(5)], 10.0)

    assert [error is None for error in errors] == [True] * 3 + [False] * 2
    assert len(bench.take(feed, 3, within=2.5)) == 3


@ON_STORES
def test_a_take_that_is_full_says_that_there_may_be_more(bench: Bench) -> None:
    """However many were asked for: Redis gives no more at once, and the rest would wait for the next look."""
    bench.publish(*[bench.message() for _ in range(3 * TAKE_MOST)])
    feed = bench.feed(prefetch=10 * TAKE_MOST)

    found = [delivery for _ in range(3) for delivery in feed.fetch(2 * TAKE_MOST, {})]

    assert len({delivery.id for delivery in found}) == 3 * TAKE_MOST


@ON_STORES
def test_a_broker_that_is_away_is_waited_for_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each queue of a batch: whoever publishes has a deadline."""
    other = bench.declare("other")
    backend: Any = bench.backend
    asked = []

    def fail(queue: str, entries: object, max_length: int | None) -> int:
        asked.append(queue)
        raise BrokerAway("away", details={"reason": "timeout"})

    monkeypatch.setattr(backend._store(), "put", fail)
    errors = backend.publish([bench.message(), bench.message(queue=other), bench.message()], 10.0)

    assert [error.details["reason"] for error in errors] == ["timeout"] * 3
    assert asked == [bench.queue.id]


def test_what_came_meanwhile_is_left_behind(bench: Bench) -> None:
    """A feed that is closed keeps nothing."""
    feed = bench.feed()
    wait(feed)
    bench.publish(bench.message("a"), bench.message("b"))

    feed.close()

    began = monotonic()
    deliveries = bench.take(bench.feed(), 2)
    assert sorted(delivery.id for delivery in deliveries) == ["a", "b"]
    assert all(delivery.deliveries <= charge(bench) for delivery in deliveries)
    assert monotonic() - began < bench.lease


def test_what_came_meanwhile_is_work(bench: Bench) -> None:
    """Whoever would end once there is none does not end over it."""
    feed = bench.feed()
    wait(feed)
    bench.publish(bench.message("a"))

    assert feed.due_in() == 0.0
    assert [delivery.id for delivery in bench.take(feed, 1)] == ["a"]


def test_no_more_is_fetched_than_is_wanted(bench: Bench) -> None:
    """Also where there was more room when the wait began."""
    feed = bench.feed()
    wait(feed, 5)
    bench.publish(*[bench.message(f"m{n}") for n in range(5)])
    feed.wait(5.0)

    first = bench.take(feed, 1)
    capped = feed.fetch(5, {bench.queue.id: 1})
    rest = bench.take(feed, 3)

    assert len(capped) <= 1
    rest += bench.take(feed, 4 - len(capped) - len(rest))
    assert [delivery.id for delivery in first + capped + rest] == [f"m{n}" for n in range(5)]


def test_each_queue_is_heard(make_bench: Callable[..., Bench]) -> None:
    """A feed of several queues that waits is woken for each of them, and has room for little."""
    bench = make_bench()
    other = make_bench()
    feed = bench.feed(bench.queue, other.queue)
    for number in range(6):
        here = (bench, other)[number % 2 if number < 4 else 0]
        assert feed.fetch(1, {}) == []
        feed.wait(0.05)
        here.publish(here.message(f"m{number}"))
        began = monotonic()
        (delivery,) = bench.take(feed, 1)
        assert (delivery.queue, delivery.id) == (here.queue.id, f"m{number}")
        assert monotonic() - began < 2.0
        assert feed.settle([Settlement(delivery, DONE)]) == ([], [])


@ON_STORES
def test_what_comes_back_to_whoever_held_it_too_long_is_known(bench: Bench) -> None:
    """A process that was stopped for longer than a lease does not take its own message for another one."""
    feed = bench.feed()
    bench.publish(bench.message("a"))
    (before,) = bench.take(feed, 1)
    losses = feed.losses
    until = monotonic() + 10.0
    # Nothing is renewed meanwhile.
    while not (found := feed.fetch(5, {})) and monotonic() < until:
        feed.wait(until - monotonic())

    (after,) = found
    assert (after.id, after.deliveries) == ("a", 1)
    assert (before.lost, feed.losses - losses) == (True, 1)
    assert feed.settle([Settlement(before, DONE)]).late
    assert feed.settle([Settlement(after, DONE)]) == ([], [])


def test_a_queue_that_has_room_again_is_heard(make_bench: Callable[..., Bench]) -> None:
    """At once, however long what was asked before would still wait for the others."""
    bench = make_bench()
    other = make_bench()
    feed = bench.feed(bench.queue, other.queue)
    assert feed.fetch(50, {other.queue.id: 0}) == []
    feed.wait(0.05)
    # Looked into, and found empty, before anybody listens to it.
    assert feed.fetch(50, {}) == []
    feed.wait(0.05)
    assert feed.fetch(50, {}) == []
    other.publish(other.message("a"))

    began = monotonic()
    assert [delivery.id for delivery in bench.take(feed, 1)] == ["a"]
    assert monotonic() - began < 1.5


@ON_STORES
def test_what_is_due_later_is_known_to_whoever_has_room(bench: Bench) -> None:
    """The one that has heard of it may have none when it is due."""
    busy, idle = bench.feed(), bench.feed()
    wait(busy, 1)
    wait(idle, 1)
    published = monotonic()
    bench.publish(bench.message("later", delay=1.0), bench.message("now"))
    (now,) = bench.take(busy, 1)
    assert (now.id, busy.settle([Settlement(now, DONE)])) == ("now", ([], []))

    assert [delivery.id for delivery in bench.take(idle, 1, within=4.0)] == ["later"]
    assert monotonic() - published < 2.5


@ON_STORES
@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_what_another_queue_leaves_no_room_for_is_heard_of_elsewhere(
    make_bench: Callable[..., Bench], delay: float
) -> None:
    """The one that was woken is busy with that one; whoever waits is not to learn of it by looking now and then."""
    bench = make_bench(lease=30.0)
    other = make_bench()
    busy = bench.feed(bench.queue, other.queue)
    # What may be taken ahead is of the other queue from now on.
    other.publish(other.message())
    assert busy.settle([Settlement(delivery, DONE) for delivery in bench.take(busy, 1)]) == ([], [])
    wait(busy, 1)
    idle = bench.feed()
    wait(idle)
    published = monotonic()
    bench.publish(bench.message("mine", delay=delay))
    # It hears of it, and when it will be due, before it has anything to do.
    busy.wait(5.0)
    if delay:
        wait(busy, 1)
    other.publish(*[other.message(f"m{n}") for n in range(50)])
    while busy.fetch(1, {bench.queue.id: 0}) == []:
        busy.wait(1.0)
    for _ in range(2):
        wait(busy, 0)

    assert [delivery.id for delivery in bench.take(idle, 1, within=4.0)] == ["mine"]
    assert monotonic() - published < delay + 3.0


@ON_STORES
def test_what_is_due_later_is_known_when_its_only_hearer_has_left(make_bench: Callable[..., Bench]) -> None:
    """A worker that stops says so to those who would look now and then only."""
    bench = make_bench(lease=30.0)
    first = bench.feed()
    wait(first)
    idle = bench.feed()
    wait(idle)
    published = monotonic()
    bench.publish(bench.message("later", delay=1.0))
    wait(first)
    wait(first)
    first.close()

    assert [delivery.id for delivery in bench.take(idle, 1, within=4.0)] == ["later"]
    assert monotonic() - published < 4.0


@ON_REDIS
def test_a_take_follows_the_wake_up(bench: Bench) -> None:
    """On Redis what waits is leased as soon as it is there, before anybody here has woken up."""
    feed = bench.feed()
    assert isinstance(feed, StoredFeed)
    wait(feed)
    assert feed._store.ahead is not None

    bench.publish(bench.message("a"))

    assert isinstance(bench.backend, StoredBackend)
    assert bench.backend._store().counts(bench.queue.id).leased == 1
    feed.wait(5.0)
    assert [delivery.id for delivery in feed.fetch(5, {})] == ["a"]


@ON_REDIS
def test_a_take_that_fails_is_made_again(bench: Bench) -> None:
    """A server that cannot carry it out behind the wake-up says so to whoever looks."""
    feed = bench.feed()
    assert isinstance(feed, StoredFeed)
    wait(feed)
    leases = prefix(bench.queue.id) + "l"
    with redis.Redis.from_url(bench.broker.url) as client:
        client.set(leases, "a stranger's")
        bench.publish(bench.message("a"))
        feed.wait(5.0)
        with pytest.raises(Error, match="WRONGTYPE"):
            feed.fetch(5, {})
        client.delete(leases)
    assert [delivery.id for delivery in bench.take(feed, 1)] == ["a"]


@ON_REDIS
def test_without_the_right_to_unblock_nothing_is_taken_ahead(bench: Bench) -> None:
    """For it could not be withdrawn; all else is the same. The least rights of a worker are without it."""
    with account(bench.broker, lambda _: printed(bench, "worker", [])) as url:
        mine = Bench(Broker(bench.broker.name, url, bench.broker.used), lease=bench.lease)
        try:
            feed = mine.feed()
            assert isinstance(feed, StoredFeed)
            wait(feed)
            assert feed._store.ahead is None
            mine.publish(mine.message("a"))
            assert [delivery.id for delivery in mine.take(feed, 1)] == ["a"]
        finally:
            for feed in mine.feeds:
                feed.close()
            mine.backend.close()


@ON_STORES
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_each_message_is_done_once(bench: Bench, seed: int) -> None:
    """Feeds wait, fetch, give back, put back and settle in any order, with little room or much."""
    chance = random.Random(seed)
    feeds = [bench.feed() for _ in range(3)]
    held: dict[int, list[Delivery]] = {0: [], 1: [], 2: []}
    done: Counter[str] = Counter()
    published: set[str] = set()

    def settle(number: int, outcome: Outcome, count: int) -> None:
        batch, held[number] = held[number][:count], held[number][count:]
        late, failed = feeds[number].settle([Settlement(delivery, outcome) for delivery in batch])
        assert (late, failed) == ([], [])
        if outcome is DONE:
            done.update(delivery.id for delivery in batch)

    for step in range(300):
        number = chance.randrange(3)
        feed = feeds[number]
        match chance.randrange(9):
            case 0 | 1:
                ids = [uuid4().hex for _ in range(chance.choice([1, 1, 1, 2, 20]))]
                bench.publish(*[bench.message(id) for id in ids])
                published.update(ids)
            case 2 | 3:
                credit = chance.choice([0, 1, 2, 30])
                cap = chance.choice([0, 1, 30])
                found = feed.fetch(credit, {bench.queue.id: cap})
                assert len(found) <= min(credit, cap)
                assert all(delivery.deliveries == 0 for delivery in found)
                held[number] += found
            case 4:
                feed.wait(chance.choice([0.0, 0.001]))
            case 5:
                feed.put_back()
            case 6:
                feed.due_in()
            case 7:
                settle(number, DONE, chance.randrange(6))
            case 8:
                settle(number, Outcome("release"), chance.randrange(3))
        if step % 20 == 0:
            for each in feeds:
                each.renew()
    for number, feed in enumerate(feeds):
        settle(number, DONE, len(held[number]))
        feed.close()
    last = bench.feed()
    while sum(done.values()) < len(published):
        found = bench.take(last, 1)
        assert found, "something was lost"
        assert last.settle([Settlement(delivery, DONE) for delivery in found]) == ([], [])
        done.update(delivery.id for delivery in found)
    assert set(done) == published
    assert set(done.values()) == {1}


@ON_STORES
@pytest.mark.parametrize("how", [StoredFeed.put_back, StoredFeed.close])
def test_what_goes_back_keeps_its_account(bench: Bench, how: Callable[[StoredFeed], None]) -> None:
    """A delivery that nobody settled stays counted, whoever holds the message for a moment and gives it back."""
    bench.publish(bench.message("a"))
    bench.take(bench.feed(), 1)
    holder = bench.feed()
    (delivery,) = bench.take(holder, 1, within=bench.lease * 5)
    assert delivery.deliveries == 1
    feed = bench.feed()
    assert isinstance(feed, StoredFeed)
    wait(feed)
    assert holder.settle([Settlement(delivery, Outcome("release", deliveries=1))]) == ([], [])
    if bench.broker.name == "redis":
        assert isinstance(bench.backend, StoredBackend)
        assert bench.backend._store().counts(bench.queue.id).leased == 1, "it was not taken ahead"

    how(feed)

    (delivery,) = bench.take(bench.feed(), 1)
    assert delivery.deliveries == 1


@ON_STORES
def test_what_is_held_at_the_end_keeps_its_account(bench: Bench) -> None:
    """A feed that is closed with a message in its hands gives it back as it was."""
    bench.publish(bench.message("a"))
    bench.take(bench.feed(), 1)
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1, within=bench.lease * 5)
    assert delivery.deliveries == 1

    feed.close()

    (delivery,) = bench.take(bench.feed(), 1)
    assert delivery.deliveries == 1
