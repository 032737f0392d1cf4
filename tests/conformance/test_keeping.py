"""What must be kept although something odd happens to it: letters of one id, leases while clocks jump, odd ids."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from threading import Thread
from time import monotonic
from typing import Any

import amqp
import pytest
import redis

import kq
from kq import clock, errors
from kq.backend import Delivery, QueueSpec, Settlement
from kq.backends.rabbitmq_feed import RabbitFeed
from kq.backends.redis_error import Refusal
from kq.backends.sqlite import SQLiteStore
from kq.backends.store import BrokerAway, Entry
from kq.config import Settings
from kq.envelope import Envelope, clean, pack
from kq.errors import Internal
from kq.outcome import DONE, RELEASE, Failure, Outcome
from kq.scheme import open_backend
from tests.broker import REDIS_URL, Broker, amqp_channel
from tests.conformance.conftest import LEASE, ON_RABBITMQ, ON_REDIS, ON_SQLITE, ON_STORES, Bench
from tests.integration.conftest import wait_for
from tests.proxy import Proxy


def test_dead_letters_of_one_id_are_all_kept(app: kq.App, broker: Broker) -> None:
    """Two messages of one id that die in one dead-letter queue are two letters, listed and replayed as such."""
    one, two, dead = broker.queue_id("one"), broker.queue_id("two"), broker.queue_id("letters")
    handled: list[str] = []

    def refuse(payload: Any) -> None:
        handled.append(payload)
        if len(handled) <= 2:
            raise errors.Invalid("no")

    for queue_id in (one, two):
        app.queue(queue_id, dead_letter=dead)
        app.consumer(queue_id)(refuse)
        app.publish(queue_id, f"from {queue_id}", message_id="order-1")
    app.drain(10.0)

    letters = app.dead(one).list()
    assert sorted((letter.queue_id, letter.payload) for letter in letters) == sorted(
        (queue_id, f"from {queue_id}") for queue_id in (one, two)
    )
    assert app.dead(one).replay() == 1
    assert app.dead(two).replay(["order-1"]) == 1
    app.drain(10.0)
    assert sorted(handled[2:]) == sorted(f"from {queue_id}" for queue_id in (one, two))


def test_letters_of_one_id_are_dropped_by_it(app: kq.App, broker: Broker) -> None:
    """Dropping an id drops every letter that has it."""
    one, two, dead = broker.queue_id("one"), broker.queue_id("two"), broker.queue_id("letters")

    def refuse(payload: Any) -> None:
        raise errors.Invalid("no")

    for queue_id in (one, two):
        app.queue(queue_id, dead_letter=dead)
        app.consumer(queue_id)(refuse)
        app.publish(queue_id, {"n": 1}, message_id="order-1")
    app.publish(one, {"n": 2}, message_id="order-2")
    app.drain(10.0)

    app.dead(one).purge(["order-1"])

    assert [letter.id for letter in app.dead(one).list()] == ["order-2"]


def test_hundreds_of_letters_are_replayed_once_each(app: kq.App, queue_id: str) -> None:
    """Replaying moves every letter once, however many there are; those of other ids stay."""
    handled: list[int] = []
    failing = True

    @app.consumer(queue_id)
    def handle(payload: int) -> None:
        if failing:
            raise errors.Invalid("no")
        handled.append(payload)

    ids = app.publish_many(queue_id, list(range(1, 251)))
    app.drain(30.0)
    failing = False

    assert app.dead(queue_id).replay(ids[:230]) == 230
    app.drain(30.0)
    assert sorted(handled) == list(range(1, 231))
    assert sorted(letter.id for letter in app.dead(queue_id).list()) == sorted(ids[230:])
    assert app.dead(queue_id).replay() == 20
    app.drain(30.0)
    assert sorted(handled) == list(range(1, 251))
    assert app.info(queue_id).dead == 0


@pytest.mark.parametrize("values", [{}, {"max_priority": 9}])
def test_dead_workers_are_counted_on_every_queue(bench: Bench, values: dict[str, Any]) -> None:
    """Deliveries that nobody settled add up, also where the broker itself does not count them."""
    queue = bench.declare("counted", **values)
    bench.publish(bench.message("a", queue=queue))
    for lost in range(3):
        feed = bench.feed(queue)
        (delivery,) = bench.take(feed, 1)
        assert delivery.deliveries == lost
        bench.abandon(feed)


@pytest.mark.parametrize("values", [{}, {"max_priority": 9}])
def test_what_is_put_aside_keeps_its_account(bench: Bench, values: dict[str, Any]) -> None:
    """A message that is released untried, with what is on its account, is not counted anew and not forgiven."""
    queue = bench.declare("counted", **values)
    bench.publish(bench.message("a", queue=queue))
    first = bench.feed(queue)
    bench.take(first, 1)
    bench.abandon(first)
    feed = bench.feed(queue)
    for _ in range(2):
        (delivery,) = bench.take(feed, 1)
        assert delivery.deliveries == 1
        feed.settle([Settlement(delivery, delivery.as_it_came)])


def test_what_waits_in_a_worker_that_stops_keeps_its_account(make_app: Callable[..., kq.App], bench: Bench) -> None:
    """A worker that stops gives back what it has not run with its count of lost deliveries."""
    bench.publish(bench.message("a"), bench.message("b"))
    dead = bench.feed()
    bench.take(dead, 2)
    bench.abandon(dead)
    app = make_app()
    found: list[Delivery] = []

    @app.consumer(bench.queue.id)
    def handle(payload: Any) -> None:
        worker.stop()
        found.extend(bench.take(bench.feed(), 1))

    worker = app.worker(concurrency=1, prefetch=10)

    worker.run()

    assert [delivery.deliveries for delivery in found] == [1]


def test_whoever_pulls_does_not_die_of_a_message_for_ever(make_app: Callable[..., kq.App], bench: Bench) -> None:
    """A program that pulls is given no message that so many others have died with."""
    bench.publish(bench.message("a"))
    for _ in range(2):
        dead = bench.feed()
        bench.take(dead, 1)
        bench.abandon(dead)
    app = make_app(max_deliveries=2)
    with kq.Consumer(app, bench.queue.id) as consumer:
        app.publish(bench.queue.id, "behind")
        message = consumer.receive(timeout=20)
        assert message is not None
        # On a store the other one comes back when its lease ends.
        while message is not None and message.payload() == "behind":
            message.ack()
            message = consumer.receive(timeout=3 * LEASE)
    assert message is None
    assert [letter.reason for letter in app.dead(bench.queue.id).list()] == ["crash_loop"]


@ON_STORES
def test_what_cannot_be_put_back_now_is_handed_over_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was taken ahead stays its feed's where giving it back fails: nobody else would ever see it."""
    feed: Any = bench.feed()
    bench.publish(bench.message("a"), bench.message("b"))
    feed._early.extend(bench.take(feed, 2))

    def fail(queue: str, endings: Any) -> list[bool]:
        raise BrokerAway("away", details={"reason": "unavailable"})

    with monkeypatch.context() as patched:
        patched.setattr(feed._store, "settle", fail)
        with pytest.raises(BrokerAway):
            feed.put_back()
    assert [delivery.id for delivery in feed.fetch(10, {})] == ["a", "b"]


@ON_STORES
def test_what_finds_no_room_is_given_back(bench: Bench) -> None:
    """What was taken ahead would wait as long as the handlers run that have the room by now; others may be idle."""
    feed: Any = bench.feed()
    bench.publish(bench.message("a"), bench.message("b"), bench.message("c"))
    feed._early.extend(bench.take(feed, 3))
    assert [delivery.id for delivery in feed.fetch(1, {})] == ["a"]
    assert feed.fetch(0, {}) == []
    feed.wait(0.0)
    assert [(delivery.id, delivery.deliveries) for delivery in bench.take(bench.feed(), 2)] == [("b", 0), ("c", 0)]


@ON_STORES
def test_a_queue_out_of_order_keeps_no_other_from_being_given_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops gives back what can be given back."""
    sick, sound = bench.declare("sick"), bench.declare("sound")
    bench.backend.publish([bench.message("a", queue=sick), bench.message("b", queue=sound)], 10.0)
    feed: Any = bench.feed(sick, sound)
    bench.take(feed, 2)
    settle = feed._store.settle

    def refuse(queue: str, endings: Any) -> list[bool]:
        if queue == sick.id:
            raise Internal("out of order", details={"reason": "refused"})
        return list(settle(queue, endings))

    with monkeypatch.context() as patched:
        patched.setattr(feed._store, "settle", refuse)
        feed.close()
    (delivery,) = bench.take(bench.feed(sound), 1, within=LEASE / 2)
    assert (delivery.id, delivery.deliveries) == ("b", 0)


@ON_RABBITMQ
def test_what_was_done_is_not_run_again_after_a_lost_acknowledgement(bench: Bench) -> None:
    """A message whose acknowledgement the broker did not get is acknowledged when it comes back, unseen."""
    bench.publish(bench.message("a"))
    feed: Any = bench.feed()
    (delivery,) = bench.take(feed, 1)
    feed._drop_link()
    assert delivery.lost
    assert [settlement.delivery.id for settlement in feed.settle([Settlement(delivery, DONE)]).late] == ["a"]

    assert bench.take(feed, 1, within=2.0) == []
    assert bench.backend.info(bench.queue).ready == 0


@ON_RABBITMQ
def test_what_was_lost_with_our_own_connection_is_no_dead_worker(bench: Bench) -> None:
    """A worker that outlives its connection does not count against a message."""
    bench.publish(bench.message("a"))
    feed: Any = bench.feed()
    for _ in range(3):
        (delivery,) = bench.take(feed, 1)
        assert delivery.deliveries == 0
        feed._drop_link()


@pytest.mark.parametrize("values", [{}, {"max_priority": 9}])
def test_many_queues_give_each_message_once(bench: Bench, values: dict[str, Any]) -> None:
    """However often what is wanted of them changes, nothing is given out twice, or counted as lost by a worker."""
    queues = [bench.declare(f"many{n}", **values) for n in range(12)]
    expected = {f"{queue.id}.{n}" for queue in queues for n in range(40)}
    bench.publish(*[bench.message(f"{queue.id}.{n}", queue=queue) for queue in queues for n in range(40)])
    feed = bench.feed(*queues, prefetch=500)
    seen: Counter[str] = Counter()
    held: list[Delivery] = []
    for credit in itertools.chain(range(1, 12), (40, 3, 0, 200), itertools.repeat(500)):
        if sum(seen.values()) >= len(expected):
            break
        found = feed.fetch(credit, {queues[0].id: 2} if credit == 40 else {})
        if not found and credit == 500:
            feed.wait(5.0)
        assert all(delivery.deliveries == 0 for delivery in found)
        seen.update(delivery.id for delivery in found)
        held += found
        # Every second one, so that what is acknowledged has gaps.
        assert feed.settle([Settlement(delivery, DONE) for delivery in held[::2]]) == ([], [])
        held = held[1::2]
    assert feed.settle([Settlement(delivery, DONE) for delivery in held]) == ([], [])
    assert seen == Counter(expected)
    assert bench.take(feed, 1, within=0.3) == []
    assert sum(bench.backend.info(queue).message_count for queue in queues) == 0


@ON_RABBITMQ
def test_put_back_takes_nothing_along(bench: Bench) -> None:
    """What the broker has pushed beyond what was fetched is back for others at once."""
    bench.publish(*[bench.message(f"m{n}") for n in range(20)])
    feed: Any = bench.feed()
    (one,) = feed.fetch(1, {}) or bench.take(feed, 1)
    feed.fetch(16, {})
    feed.put_back()

    others = bench.take(bench.feed(), 3, within=5.0)

    assert len(others) == 3
    feed.settle([Settlement(one, RELEASE)])


@ON_SQLITE
def test_a_jump_of_the_clock_ends_no_lease(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour that passes in an instant gives nobody another worker's messages, and makes nothing due."""
    bench.publish(bench.message("held"), bench.message("later", delay=60.0))
    feed = bench.feed()
    (held,) = bench.take(feed, 1)
    monkeypatch.setattr(clock, "_OFFSET", 3600.0)

    assert bench.take(bench.feed(), 1, within=0.3) == []
    assert feed.settle([Settlement(held, DONE)]) == ([], [])


def let_pass(bench: Bench, seconds: float) -> None:
    """Have a time pass on Redis in which nobody reaches it: everybody's leases are so much nearer their end."""
    client: Any
    with closing(redis.Redis.from_url(bench.broker.url)) as client:
        for kind in ("l", "c"):
            key = f"{{kq:{bench.queue.id}}}:{kind}"
            client.zadd(key, {name: end - 1000 * seconds for name, end in client.zrange(key, 0, -1, withscores=True)})


@ON_REDIS
@pytest.mark.parametrize(
    ("first", "seconds"), [("take", 31.0), ("renew", 31.0), ("join", 31.0), ("take", 3600.0), ("renew", 3600.0)]
)
def test_while_nobody_reaches_the_server_leases_do_not_end(
    make_bench: Callable[..., Bench], first: str, seconds: float
) -> None:
    """The first that comes back, or is new, would have what the others run; as it would where the clock is set."""
    bench = make_bench(lease=30.0)
    holder, other = bench.feed(), bench.feed()
    bench.publish(bench.message("held"), bench.message("waits"))
    (held,) = bench.take(holder, 1)
    let_pass(bench, seconds)

    if first == "renew":
        other.renew()
    elif first == "join":
        other = bench.feed()
    found = other.fetch(5, {})

    assert [delivery.id for delivery in found] == ["waits"]
    holder.renew()
    assert not held.lost
    assert holder.settle([Settlement(held, DONE)]) == ([], [])


@ON_REDIS
def test_a_server_that_was_away_keeps_no_lease_of_the_dead(make_bench: Callable[..., Bench]) -> None:
    """Those who live have a third of a lease to come back."""
    bench = make_bench(lease=30.0)
    holder, other = bench.feed(), bench.feed()
    bench.publish(bench.message("held"))
    bench.take(holder, 1)
    let_pass(bench, 31.0)
    other.renew()
    assert other.fetch(5, {}) == []

    client: Any
    with closing(redis.Redis.from_url(bench.broker.url)) as client:
        leases = f"{{kq:{bench.queue.id}}}:l"
        ((_, end),) = client.zrange(leases, 0, -1, withscores=True)
        seconds, microseconds = client.time()
        assert end - 1000 * seconds - microseconds / 1000 < 10_500
        client.zadd(leases, {"held": end - 10_000})

    # Only the feed that has been heard of lately.
    assert [delivery.id for delivery in bench.take(bench.feed(), 1, within=10.0)] == ["held"]


@ON_REDIS
def test_who_polls_takes_what_the_dead_have_left(make_bench: Callable[..., Bench]) -> None:
    """A lease and a half after it has found that nobody is heard of; plain Kombu programs do, which are not counted."""
    bench = make_bench(lease=30.0)
    bench.publish(bench.message("held"))
    bench.take(bench.feed(), 1)
    let_pass(bench, 100.0)
    store = bench.backend._store()  # type: ignore[attr-defined]
    assert store.take(bench.queue.id, 5, 30_000).leases == []

    client: Any
    with closing(redis.Redis.from_url(bench.broker.url)) as client:
        client.hincrby(f"{{kq:{bench.queue.id}}}:a", "since", -44_000)
        assert store.take(bench.queue.id, 5, 30_000).leases == []
        client.hincrby(f"{{kq:{bench.queue.id}}}:a", "since", -2_000)
        assert [lease.id for lease in store.take(bench.queue.id, 5, 30_000).leases] == ["held"]
        # Until somebody is heard of again.
        bench.feed()
        assert not client.exists(f"{{kq:{bench.queue.id}}}:a")


@ON_REDIS
@pytest.mark.parametrize("known", [False, True])
def test_no_more_bytes_are_taken_at_once_than_may_be(make_bench: Callable[..., Bench], known: bool) -> None:
    """Also by the first who takes something, who does not know how large it is; what is left is taken next."""
    bench = make_bench(lease=30.0)
    bench.publish(*(bench.message(f"{n:02}", body=b'"' + b"x" * 900_000 + b'"') for n in range(25)))
    feed = bench.feed()
    sizes = []
    if known:
        sizes.append(len(feed.fetch(1, {})))
    while found := feed.fetch(100, {}):
        assert [delivery.id for delivery in found] == [f"{sum(sizes) + n:02}" for n in range(len(found))]
        sizes.append(len(found))
    assert sizes == ([1, 10, 10, 4] if known else [10, 10, 5])


@ON_REDIS
def test_who_starts_long_after_the_others_have_died_waits_for_nobody(make_bench: Callable[..., Bench]) -> None:
    """Nor do plain Kombu programs, which may take something and never be counted."""
    bench = make_bench(lease=30.0)
    bench.publish(bench.message("held"))
    bench.take(bench.feed(), 1)
    let_pass(bench, 100.0)

    assert [delivery.id for delivery in bench.feed().fetch(1, {})] == ["held"]


@ON_SQLITE
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_gone_confirms_nothing(broker: Broker, replaced: bool) -> None:
    """A file that is deleted or replaced under a publisher is noticed: it is told so, and the next one is stored."""
    path = broker.url.removeprefix("sqlite:///")
    with closing(SQLiteStore(path, 10.0)) as store, closing(SQLiteStore(path, 10.0)) as other:
        store.declare("app:q", {})
        for name in (path, f"{path}-wal", f"{path}-shm"):
            os.unlink(name)
        if replaced:
            other.declare("app:q", {})

        with pytest.raises(Internal, match="deleted or replaced") as caught:
            store.put("app:q", [Entry("a", b"raw", 4)], None)

        assert caught.value.details["reason"] == "unavailable"
        store.declare("app:q", {})
        assert store.put("app:q", [Entry("a", b"raw", 4)], None) == 1
        assert [id for id, _ in other.browse("app:q", 10, 0)] == ["a"]


@ON_SQLITE
def test_who_only_reads_sees_what_has_been_put_in_a_files_place(broker: Broker) -> None:
    """As whoever watches queues, when a backup is restored."""
    path = broker.url.removeprefix("sqlite:///")
    with closing(SQLiteStore(path, 10.0)) as store, closing(SQLiteStore(path, 10.0)) as other:
        store.declare("app:q", {})
        assert store.counts("app:q").ready == 0
        for name in (path, f"{path}-wal", f"{path}-shm"):
            os.unlink(name)
        other.declare("app:q", {})
        assert other.put("app:q", [Entry("a", b"raw", 4)], None) == 1

        assert store.counts("app:q").ready == 1


@ON_REDIS
@pytest.mark.parametrize("key", [b"\xff\xfe", b"\x01zz", b"\x01ab", b"\x01"])
def test_an_id_that_is_no_text_can_be_settled(bench: Bench, key: bytes) -> None:
    """Whatever bytes a stranger uses as an id, the message can be held, and has one end."""
    with closing(redis.Redis.from_url(bench.broker.url)) as client:
        prefix = f"{{kq:{bench.queue.id}}}:"
        client.hset(prefix + "m", key, b"raw")
        client.rpush(prefix + "r:4", key)
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    delivery.id.encode()
    feed.renew()
    assert not delivery.lost

    assert feed.settle([Settlement(delivery, Outcome("dead", 0.0, 0, 0, "undecodable"))]) == ([], [])
    assert bench.backend.info(bench.queue).message_count == 0
    (letter,) = bench.backend.browse(bench.dead, 10, 0)
    assert letter.body == b"raw"


@ON_REDIS
def test_an_odd_id_in_an_envelope_is_no_matter(bench: Bench) -> None:
    """A message whose envelope has such an id can be dead-lettered."""
    odd = Envelope("\x01zz", {}, {}, b"1")
    with closing(redis.Redis.from_url(bench.broker.url)) as client:
        prefix = f"{{kq:{bench.queue.id}}}:"
        client.hset(prefix + "m", "plain", pack(odd))
        client.rpush(prefix + "r:4", "plain")
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    assert feed.settle([Settlement(delivery, Outcome("dead", 0.0, 0, 0, "undecodable"))]) == ([], [])
    (letter,) = bench.backend.browse(bench.dead, 10, 0)
    assert letter.id == "\x01zz"


@ON_STORES
def test_a_replay_passes_over_what_stays_and_misses_nothing(bench: Bench) -> None:
    """What cannot be moved, and what came from elsewhere, hides no letter, wherever a page ends."""
    bench.publish(bench.message("waits"))
    mine, elsewhere = {"x_original_queue": bench.queue.id}, {"x_original_queue": "app:elsewhere"}
    letters = [bench.message("waits", queue=bench.dead, headers=mine)]
    letters += [bench.message(f"other{n}", queue=bench.dead, headers=elsewhere) for n in range(199)]
    letters += [bench.message(f"mine{n}", queue=bench.dead, headers=mine) for n in range(3)]
    for letter in letters:
        bench.publish(letter)

    assert bench.backend.replay(bench.dead, None, bench.queue, clean) == 3
    assert bench.backend.info(bench.queue).ready == 4
    assert bench.backend.replay(bench.dead, ["mine1", "waits"], bench.queue, clean) == 0


@ON_STORES
def test_a_quiet_queue_is_looked_into_however_busy_another_one_is(bench: Bench) -> None:
    """Whoever never waits, because another queue takes all places that become free, hears of nothing."""
    busy, quiet = bench.declare("busy"), bench.declare("quiet")
    feed = bench.feed(busy, quiet)
    assert feed.fetch(1, {}) == []
    bench.publish(*(bench.message(queue=busy) for _ in range(3)))
    (first,) = bench.take(feed, 1)
    feed.settle([Settlement(first, RELEASE)])
    bench.publish(bench.message("rare", queue=quiet))
    # It would be looked into by itself after five seconds.
    until = monotonic() + 3.0
    found: list[str] = []
    while "rare" not in found and monotonic() < until:
        for delivery in feed.fetch(1, {}):
            found.append(delivery.id)
            feed.settle([Settlement(delivery, RELEASE if delivery.queue == busy.id else DONE)])
    assert "rare" in found


@ON_STORES
def test_a_wake_up_that_comes_while_there_is_no_room_is_not_forgotten(bench: Bench) -> None:
    """What was rung for while nothing could be taken is looked into as soon as something can."""
    one, other = bench.declare("one"), bench.declare("other")
    feed = bench.feed(one, other)
    bench.publish(bench.message("a", queue=one))
    (delivery,) = bench.take(feed, 1)
    # Both are known to be quiet, and listened to.
    assert feed.fetch(1, {}) == []
    feed.wait(0.05)
    assert feed.fetch(0, {}) == []
    bench.publish(bench.message("b", queue=other))
    feed.wait(0.2)
    feed.settle([Settlement(delivery, DONE)])
    assert [found.id for found in bench.take(feed, 1, within=2.5)] == ["b"]


@ON_STORES
def test_no_lease_of_a_queue_that_is_deleted_and_made_again_is_one_of_before(bench: Bench) -> None:
    """However soon that is: by their tokens leases are told apart."""
    backend: Any = bench.backend
    store = backend._store()
    tokens = []
    for _ in range(100):
        store.declare(bench.queue.id, {})
        store.put(bench.queue.id, [Entry("same", b"x", 4)], None)
        tokens.append(store.take(bench.queue.id, 1, 30_000).leases[0].token)
        store.delete(bench.queue.id)

    assert tokens == sorted(set(tokens))


@ON_STORES
def test_a_lease_on_a_deleted_queue_is_none_on_the_next_one_of_its_name(bench: Bench) -> None:
    """Tokens are never given twice: who has one of before ends nobody's lease, and learns that its own is lost."""
    first = bench.feed()
    bench.publish(bench.message("same"))
    (before,) = bench.take(first, 1)
    bench.delete(bench.queue.id)
    bench.backend.declare(bench.queue, create=True, exact=True)
    bench.publish(bench.message("same"))
    (now,) = bench.take(bench.feed(), 1)
    first.renew()

    assert before.lost
    assert first.settle([Settlement(before, DONE)]).late
    assert not now.lost
    assert bench.backend.info(bench.queue).in_flight == 1


@ON_STORES
def test_a_limit_holds_on_a_queue_that_somebody_else_has_made(bench: Bench) -> None:
    """Who made it without a word of the limit has not said that there is none."""
    id = bench.broker.queue_id("made")
    store: Any = bench.feed()._store  # type: ignore[attr-defined]
    store.declare(id, {})
    queue = QueueSpec(id, max_length=2)
    bench.backend.declare(queue, create=True, exact=True)
    results = bench.backend.publish([bench.message(queue=queue) for _ in range(3)], 10.0)
    assert [result is None for result in results] == [True, True, False]


@ON_RABBITMQ
def test_what_was_answered_before_answers_nothing_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch comes to grief before any of it is sent, it is not taken for what was answered before."""
    backend: Any = bench.backend
    bench.publish(*(bench.message() for _ in range(3)))

    def break_down(*arguments: object) -> None:
        raise OSError("the wire is cut")

    monkeypatch.setattr(backend._sender, "_make_buckets", break_down)
    results = backend.publish([bench.message("plain"), bench.message("delayed", delay=60)], 5.0)
    assert [error.details["reason"] for error in results] == ["unavailable"] * 2
    assert backend.info(bench.queue).ready == 3


@ON_RABBITMQ
def test_a_bucket_that_cannot_be_had_is_no_matter_of_others(bench: Bench) -> None:
    """Only what is delayed by as much is refused, and no channel is left open each time."""
    name = "kq.delay.20000000"
    backend: Any = bench.backend
    with amqp_channel() as channel:
        channel.exchange_declare(name, "direct", durable=False, auto_delete=False)
    try:
        for _ in range(3):
            other = bench.message("delayed", delay=20_000)
            results = backend.publish([bench.message(), other, other, bench.message()], 10.0)
            assert [result is None for result in results] == [True, False, False, True]
            assert results[1].details["reason"] == "refused"
        (lane,) = backend._lanes._idle
        assert len(lane.link.connection.channels) <= 3
    finally:
        with amqp_channel() as channel:
            channel.exchange_delete(name)
    assert backend.info(bench.queue).ready == 6


@ON_RABBITMQ
def test_a_full_window_is_no_reason_to_connect_anew(bench: Bench) -> None:
    """What was pushed and is not handed over fills the window as well: that nothing more comes says nothing."""
    bench.publish(*(bench.message() for _ in range(30)))
    feed: Any = bench.feed()
    bench.take(feed, 17)
    window = feed._subscriptions.windows[bench.queue.id]
    assert 17 < window < 30
    wait_for(lambda: feed.fetch(0, {}) == [] and len(feed._outstanding) == window, "what is pushed")
    assert not feed._has_room(bench.queue.id)


@ON_RABBITMQ
def test_what_comes_back_to_a_full_classic_queue_is_handed_over(bench: Bench) -> None:
    """It is sent on as a copy that counts; where there is no room for that it waits outside until there is."""
    queue = bench.declare("full", max_priority=9, max_length=2)
    bench.publish(*(bench.message(f"first{n}", queue=queue) for n in range(2)))
    dead = bench.feed(queue)
    bench.take(dead, 2)
    bench.publish(*(bench.message(f"then{n}", queue=queue) for n in range(2)))
    bench.abandon(dead)
    feed = bench.feed(queue)
    found = []
    for _ in range(4):
        (delivery,) = bench.take(feed, 1)
        found.append(delivery.id)
        feed.settle([Settlement(delivery, DONE)])
    assert sorted(found) == ["first0", "first1", "then0", "then1"]


@ON_RABBITMQ
def test_headers_that_leave_no_room_for_ours_are_dropped(bench: Bench) -> None:
    """A stranger's message ends as any other, although RabbitMQ takes no more headers than it has."""
    with amqp_channel() as channel:
        big = {f"h{n}": "x" * 1000 for n in range(126)}
        channel.basic_publish(amqp.Message(b"1", application_headers=big), routing_key=bench.queue.id)
    bench.publish(bench.message("innocent"))
    feed = bench.feed()
    deliveries = bench.take(feed, 2)
    failure = Failure("INTERNAL", "no", True, "t" * 4000)
    dead = Outcome("dead", 0.0, 1, 0, "max_attempts", failure)
    assert feed.settle([Settlement(delivery, dead) for delivery in deliveries]) == ([], [])
    letters = {letter.id: letter.headers for letter in bench.backend.browse(bench.dead, 10, 0)}
    assert len(letters) == 2
    (stranger,) = (headers for id, headers in letters.items() if id != "innocent")
    assert (stranger["x_dead_letter_reason"], stranger["x_headers_dropped"]) == ("max_attempts", 126)
    assert "h1" not in stranger


@contextmanager
def a_strangers_value(bench: Bench, key: str, *, dead: bool = False) -> Iterator[str]:
    """A key of the queue, or of its dead-letter queue, holds something else; afterwards what it held before."""
    name = f"{{kq:{bench.queue.id}}}{'.dead' if dead else ''}:{key}"
    with closing(redis.Redis.from_url(bench.broker.url)) as client:
        kept = client.dump(name)
        client.set(name, "a stranger's")
        try:
            yield name
        finally:
            if kept is None:
                client.delete(name)
            else:
                client.restore(name, 0, kept, replace=True)


@ON_REDIS
@pytest.mark.parametrize("key", ["m", "t", "s", "p", "x", "n", "l", "w", "r:4", "r:9", "b:4", "b:0", "d"])
@pytest.mark.parametrize("over", [False, True], ids=["held", "over"])
def test_a_key_that_holds_something_else_loses_nothing(make_bench: Callable[..., Bench], key: str, over: bool) -> None:
    """While a stranger's value stands under a queue's key, taking fails and says where; then all is still there."""
    bench = make_bench(lease=1.0 if over else 30.0)
    bench.publish(bench.message("a"), bench.message("b"), bench.message("c", priority=9))
    held = bench.take(bench.feed(), 3 if over else 1)
    feed = bench.feed()
    if over:
        # Their lease ends, and who takes next puts them back.
        wait_for(lambda: feed.due_in() == 0.0, "the end of a lease")
        held = []
    with a_strangers_value(bench, key) as name, pytest.raises(Internal, match=re.escape(name)) as caught:
        feed.fetch(10, {})

    assert caught.value.details["reason"] == "refused"
    found = bench.take(feed, 3 - len(held))
    assert sorted(delivery.id for delivery in [*held, *found]) == ["a", "b", "c"]


@ON_REDIS
@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("m", "plain"), ("r:4", "plain"), ("w", "plain"), ("r:4", "batch"), ("m", "batch"), ("r:4", "long"),
        ("m", "long"), ("w", "long"), ("r:9", "priority"), ("p", "priority"), ("d", "delayed"), ("m", "delayed"),
    ],
)  # fmt: skip
def test_what_was_refused_is_stored_when_it_is_published_again(bench: Bench, key: str, kind: str) -> None:
    """Under the same id: a refused message leaves nothing behind for which the next one would be taken."""
    sent = [
        bench.message(
            id,
            body=b"1" * (100_000 if kind == "long" else 10),
            delay=0.01 if kind == "delayed" else 0.0,
            priority=9 if kind == "priority" else 4,
        )
        for id in ("abc" if kind == "batch" else "a")
    ]
    with a_strangers_value(bench, key):
        for error in bench.backend.publish(sent, 10.0):
            assert error is not None
            assert error.details["reason"] == "refused"

    bench.publish(*sent)

    feed = bench.feed()
    assert [delivery.id for delivery in bench.take(feed, len(sent))] == [message.envelope.id for message in sent]
    assert bench.take(feed, 1, within=0.2) == []


@ON_REDIS
@pytest.mark.parametrize(
    ("outcome", "keys"),
    [
        (RELEASE, ["b:4", "s", "p", "w", "l"]),
        (Outcome("retry", 0.0, 1, 0), ["r:4", "s", "p", "w"]),
        (Outcome("retry", 0.01, 1, 0), ["d", "s"]),
    ],
    ids=["release", "retry", "later"],
)
def test_what_cannot_go_back_stays_held(bench: Bench, outcome: Outcome, keys: list[str]) -> None:
    """While a stranger's value stands in the way of a settlement it fails, and can be made again."""
    bench.publish(bench.message("a"))
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    for key in keys:
        with a_strangers_value(bench, key) as name:
            late, failed = feed.settle([Settlement(delivery, outcome)])
        assert late == []
        assert name in failed[0][1].message

    assert feed.settle([Settlement(delivery, outcome)]) == ([], [])
    assert [again.id for again in bench.take(feed, 1)] == ["a"]


@ON_REDIS
@pytest.mark.parametrize("key", ["m", "p", "d", "w", "r:4"])
def test_what_cannot_be_dead_lettered_stays_held(bench: Bench, key: str) -> None:
    """While a stranger's value stands under a key of the dead-letter queue."""
    bench.publish(bench.message("a"))
    feed = bench.feed()
    (delivery,) = bench.take(feed, 1)
    dead = Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable"))
    with a_strangers_value(bench, key, dead=True):
        late, failed = feed.settle([dead])
    assert (late, len(failed)) == ([], 1)

    assert feed.settle([dead]) == ([], [])
    assert [letter.id for letter in bench.backend.browse(bench.dead, 10, 0)] == ["a"]


def test_what_cannot_be_acknowledged_beforehand_is_given_back(
    make_app: Callable[..., kq.App], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the early acknowledgement of a batch fails, all of the batch is handled all the same, and only once."""
    app = make_app()
    early, late = broker.queue_id("early"), broker.queue_id("late")
    ran: list[Any] = []
    app.consumer(early, auto_ack=True)(ran.append)
    app.consumer(late)(ran.append)
    app.publish(early, "early")
    app.publish(late, "late")
    failures = [Internal("not now", details={"reason": "timeout"})]
    backend = app.registry.backend()
    kind = type(_feed_of(backend, app, early))
    settle = kind.settle

    def fail_once(self: Any, settlements: Sequence[Settlement]) -> Any:
        if failures and any(settlement.delivery.queue == early for settlement in settlements):
            if kind is RabbitFeed:
                # As where the connection breaks in the middle of it.
                monkeypatch.setattr(self, "_connected", _break(self))
            else:
                raise failures.pop()
        return settle(self, settlements)

    def _break(feed: Any) -> Callable[[], Any]:
        def connected() -> Any:
            monkeypatch.undo()
            failures.clear()
            raise OSError("broken")

        return connected

    monkeypatch.setattr(kind, "settle", fail_once)

    app.drain(15.0)

    assert sorted(ran) == ["early", "late"]


def _feed_of(backend: Any, app: kq.App, queue_id: str) -> Any:
    with closing(backend.feed([app.registry.spec(queue_id)], 1)) as feed:
        return feed


@ON_REDIS
def test_a_slow_way_to_many_queues_costs_no_leases(bench: Bench) -> None:
    """A round trip for each of them takes longer than a lease: they are renewed in one, also while they are settled."""
    queues = [bench.declare(f"q{n}") for n in range(60)]
    bench.publish(*(bench.message(f"m{n}", queue=queue) for n, queue in enumerate(queues)))
    other = bench.feed(*queues)
    settled: list[Any] = []

    def settle() -> None:
        settled.append(feed.settle([Settlement(delivery, DONE) for delivery in taken]))

    with closing(Proxy(REDIS_URL)) as proxy:
        backend = open_backend(Settings(broker=proxy.url, lease=bench.lease), "test")
        with closing(backend):
            feed = backend.feed(queues, 100)
            try:
                taken = bench.take(feed, len(queues))
                assert len(taken) == len(queues)
                proxy.delay_up = 0.025
                until = monotonic() + 2 * bench.lease
                while monotonic() < until:
                    feed.renew()
                    # Who else is there gets none of them.
                    assert other.fetch(100, {}) == []
                settling = Thread(target=settle)
                settling.start()
                while settling.is_alive():
                    assert other.fetch(100, {}) == []
                settling.join()
                assert settled == [([], [])]
                assert feed.losses == 0
            finally:
                feed.close()
    assert other.fetch(100, {}) == []


@ON_REDIS
def test_a_slow_way_to_many_queues_keeps_no_messages(bench: Bench) -> None:
    """What is found is handed over before all other queues have been looked into, which then are the first."""
    queues = [bench.declare(f"q{n}") for n in range(40)]
    bench.publish(*(bench.message(f"m{n}", queue=queue) for n, queue in enumerate(queues)))
    with closing(Proxy(REDIS_URL)) as proxy:
        backend = open_backend(Settings(broker=proxy.url, lease=bench.lease), "test")
        with closing(backend):
            feed = backend.feed(queues, 100)
            try:
                proxy.delay_up = 0.025
                first = feed.fetch(100, {})
                assert 0 < len(first) < len(queues)
                # Not before all have been looked into, though nothing is ready in those that were.
                began = monotonic()
                feed.wait(10.0)
                assert monotonic() - began < 5.0
                rest = bench.take(feed, len(queues) - len(first))
                ids = {delivery.id for delivery in (*first, *rest)}
                assert ids == {f"m{n}" for n in range(len(queues))}
            finally:
                feed.close()


@ON_SQLITE
def test_many_queues_are_renewed_in_one_transaction(bench: Bench) -> None:
    """Each would be written to the disk for itself."""
    feed: Any = bench.feed(*(bench.declare(f"q{n}") for n in range(20)))
    begun: list[str] = []
    with feed._store._transaction() as db:
        pass
    db.set_trace_callback(lambda statement: begun.append(statement) if statement.startswith("BEGIN") else None)
    feed.renew()
    db.set_trace_callback(None)
    assert len(begun) == 1


@ON_STORES
def test_nothing_to_renew_is_nothing_to_do(bench: Bench) -> None:
    """As where a plain Kombu program has settled all that it had, and consumes nothing."""
    feed: Any = bench.feed()
    assert feed._store.renew({}, 1000, "consumer") == {}
    feed._store.leave([], "consumer")


@ON_REDIS
def test_a_script_that_is_forgotten_is_sent_once(bench: Bench) -> None:
    """However many calls of it are made together: as after a failover, when leases have waited long enough."""
    feed: Any = bench.feed()
    lines, asked = feed._store._lines, []
    ask = lines.ask

    class Forgetful:
        """The server's answers, but that it has forgotten the script."""

        def ask(self, commands: Sequence[bytes], number: int = 1) -> list[Any]:
            asked.append(b"".join(commands))
            if len(asked) == 1:
                return [Refusal("NOSCRIPT No matching script. Please use EVAL.")] * number
            return list(ask(commands, number))

    queues = [bench.queue.id, *(bench.broker.queue_id(f"q{n}") for n in range(5))]
    feed._store._caller.lines = Forgetful()
    renewed = feed._store.renew({queue: [("gone", 1)] for queue in queues}, 1000, "consumer")
    assert renewed == {queue: [False] for queue in queues}
    assert len(asked) == 3
    assert [b"EVAL\r\n" in commands for commands in asked] == [False, True, False]
