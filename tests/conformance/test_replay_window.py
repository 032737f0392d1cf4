"""The replay window: what completed ids are remembered for, where, and for how long."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from time import monotonic
from typing import Any

import pytest
import redis

import kq
from kq.backend import Delivery, Publication, QueueSpec, Settlement
from kq.backends.memory import MemoryStore
from kq.backends.redis import RedisStore
from kq.backends.redis_key import prefix
from kq.backends.sqlite import SQLiteStore
from kq.backends.store import BrokerAway, Ending, Entry, Store
from kq.backends.stored import StoredBackend
from kq.backends.stored_feed import StoredFeed
from kq.config import Settings
from kq.envelope import clean, pack
from kq.outcome import DONE, RELEASE, Outcome
from kq.scheme import open_backend
from tests.broker import Broker
from tests.conformance.conftest import ON_STORES, Bench

#: Longer than any test, in seconds and in milliseconds.
HOUR = 3600.0
HOUR_MS = 3_600_000

DEAD = Outcome("dead", 0.0, 1, 0, "unverified")


def complete(bench: Bench, queue: QueueSpec, id: str = "a") -> Delivery:
    """Publish a message, take it and settle it as done; it must not count as replayed."""
    bench.publish(bench.message(id, queue=queue))
    feed = bench.feed(queue)
    (delivery,) = bench.take(feed, 1)
    assert not delivery.replayed
    assert feed.settle([Settlement(delivery, DONE)]) == ([], [])
    feed.close()
    return delivery


def store_of(bench: Bench) -> Store:
    """Return the store below."""
    assert isinstance(bench.backend, StoredBackend)
    return bench.backend._store()


def remembered(store: Store, queue_id: str) -> int:
    """Count what a store holds of completed ids, whether they are over or not."""
    if isinstance(store, MemoryStore):
        found = store._world.queues.get(queue_id)
        return 0 if found is None else len(found.completed)
    if isinstance(store, SQLiteStore):
        with closing(sqlite3.connect(store._path)) as db:
            return int(db.execute("SELECT count(*) FROM completed WHERE queue = ?", (queue_id,)).fetchone()[0])
    assert isinstance(store, RedisStore)
    count: Any = store._say("ZCARD", prefix(queue_id) + "k")
    return int(count)


def acknowledge(store: Store, queue_id: str, ids: list[str], keep: int) -> None:
    """Store messages, take them and acknowledge them."""
    assert store.put(queue_id, [Entry(id, b"", 4) for id in ids], None) == len(ids)
    leases = store.take(queue_id, len(ids), 30_000).leases
    endings = [Ending(lease.id, lease.token, "ack", keep=keep, completes=lease.id) for lease in leases]
    assert store.settle(queue_id, endings) == [True] * len(ids)


def test_a_completed_id_comes_back_marked(bench: Bench) -> None:
    """A second message of an id that has been completed is marked as replayed, where the broker remembers."""
    queue = bench.declare("signed", replay_window=HOUR)
    complete(bench, queue)

    bench.publish(bench.message("a", queue=queue), bench.message("b", queue=queue))
    found = {delivery.id: delivery.replayed for delivery in bench.take(bench.feed(queue), 2)}

    assert found == {"a": bench.backend.capabilities.remembers_completed, "b": False}


@ON_STORES
def test_a_copy_under_another_id_of_the_store_is_marked(bench: Bench) -> None:
    """What counts is the id in the envelope, which is signed, not the one that a stranger stored the copy under."""
    queue = bench.declare("signed", replay_window=HOUR)
    original = complete(bench, queue)

    bench.broker.put_raw(queue.id, original.raw)
    feed = bench.feed(queue)
    (copy,) = bench.take(feed, 1)

    assert copy.raw == original.raw
    assert copy.id != "a"
    assert copy.replayed


@ON_STORES
def test_completing_a_copy_under_another_id_counts(bench: Bench) -> None:
    """A message that was stored under a strange id is remembered by its own."""
    queue = bench.declare("signed", replay_window=HOUR)
    bench.broker.put_raw(queue.id, pack(bench.message("a").envelope))
    feed = bench.feed(queue)
    (stranger,) = bench.take(feed, 1)
    feed.settle([Settlement(stranger, DONE)])

    bench.publish(bench.message("a", queue=queue))

    assert [(d.id, d.replayed) for d in bench.take(feed, 1)] == [("a", True)]


@ON_STORES
def test_the_window_ends(bench: Bench) -> None:
    """An id is marked until the window is over, by the store's clock, and not any longer."""
    window = 0.3
    queue = bench.declare("signed", replay_window=window)
    started = monotonic()
    complete(bench, queue)
    feed = bench.feed(queue)

    until = monotonic() + 15
    replayed = True
    while replayed and monotonic() < until:
        bench.publish(bench.message("a", queue=queue))
        (delivery,) = bench.take(feed, 1)
        replayed = delivery.replayed
        feed.settle([Settlement(delivery, DEAD)])

    assert not replayed
    assert monotonic() - started >= window - 0.002


def test_what_is_not_done_is_not_remembered(bench: Bench) -> None:
    """Messages that were released, retried, dead-lettered or sent back from the dead are none of them marked."""
    queue = bench.declare("signed", replay_window=HOUR)
    assert queue.dead_letter is not None
    bench.publish(bench.message("a", queue=queue))
    feed = bench.feed(queue)
    for outcome in (RELEASE, Outcome("retry", 0.0, 1, 0), Outcome("retry", 0.05, 2, 0), DEAD):
        (delivery,) = bench.take(feed, 1)
        assert not delivery.replayed
        assert feed.settle([Settlement(delivery, outcome)]) == ([], [])

    assert bench.backend.replay(QueueSpec(queue.dead_letter), None, queue, clean) == 1
    (delivery,) = bench.take(feed, 1)
    assert (delivery.id, delivery.replayed) == ("a", False)
    feed.settle([Settlement(delivery, DONE)])

    bench.publish(bench.message("a", queue=queue))
    (again,) = bench.take(feed, 1)
    assert again.replayed == bench.backend.capabilities.remembers_completed


@ON_STORES
def test_a_late_ack_completes_nothing(bench: Bench) -> None:
    """Whoever lost the lease completes nothing: the message is not remembered and runs elsewhere, unmarked."""
    queue = bench.declare("signed", replay_window=HOUR)
    store = store_of(bench)
    assert store.put(queue.id, [Entry("a", b"", 4), Entry("b", b"", 4)], None) == 2
    lost, other = store.take(queue.id, 2, 30_000).leases
    assert store.settle(queue.id, [Ending("a", lost.token, "release")]) == [True]
    (held,) = store.take(queue.id, 1, 30_000).leases
    acks = [
        Ending(id, token, "ack", keep=HOUR_MS, completes=id) for id, token in (("a", lost.token), ("b", other.token))
    ]

    assert store.settle(queue.id, acks) == [False, True]
    assert store.completed(queue.id, ["a", "b"]) == {"b"}
    assert store.settle(queue.id, [acks[0]._replace(token=held.token)]) == [True]
    assert store.completed(queue.id, ["b", "c", "a"]) == {"a", "b"}


@ON_STORES
def test_nothing_is_remembered_without_a_window(bench: Bench) -> None:
    """A queue without a replay window keeps no trace of what was done on it, and nobody asks."""
    complete(bench, bench.queue)
    bench.publish(bench.message("a"))
    (again,) = bench.take(bench.feed(), 1)

    assert not again.replayed
    assert remembered(store_of(bench), bench.queue.id) == 0


@ON_STORES
def test_only_what_says_so_is_remembered(bench: Bench) -> None:
    """In one batch of acks each says for itself whether it is remembered; those of another queue are another's."""
    store, queue = store_of(bench), bench.queue.id
    assert store.put(queue, [Entry(id, b"", 4) for id in "abc"], None) == 3
    leases = store.take(queue, 3, 30_000).leases
    keeps = {"a": HOUR_MS, "b": 0, "c": HOUR_MS}
    store.settle(
        queue, [Ending(lease.id, lease.token, "ack", keep=keeps[lease.id], completes=lease.id) for lease in leases]
    )

    assert store.completed(queue, ["a", "b", "c", "d"]) == {"a", "c"}
    assert store.completed(bench.declare("other").id, ["a", "b", "c"]) == set()


@ON_STORES
def test_large_batches_are_remembered_whole(bench: Bench) -> None:
    """Of more ids than one call or statement takes, all are remembered and found."""
    store, queue = store_of(bench), bench.queue.id
    ids = [f"m-{i}" for i in range(1200)]
    for i in range(0, len(ids), 400):
        acknowledge(store, queue, ids[i : i + 400], HOUR_MS)

    assert store.completed(queue, [*ids, "other"]) == set(ids)


@ON_STORES
def test_what_is_over_is_dropped(bench: Bench) -> None:
    """Acks drop what has been remembered long enough, so that a queue holds its window and no more."""
    store, queue = store_of(bench), bench.queue.id
    ids = [f"m-{i}" for i in range(50)]
    acknowledge(store, queue, ids, 100)
    acknowledge(store, queue, ["kept"], HOUR_MS)
    until = monotonic() + 15
    while store.completed(queue, ids):
        assert monotonic() < until
    for n in range(50):
        acknowledge(store, queue, [f"n-{n}"], HOUR_MS)

    assert remembered(store, queue) == 51
    assert store.completed(queue, ["kept", "n-0", "m-0"]) == {"kept", "n-0"}


@pytest.mark.parametrize("broker", ["redis", "fakeredis"], indirect=True)
def test_redis_lets_the_memory_expire(bench: Bench) -> None:
    """The key of a queue that nobody uses any more goes with its last id; a shorter window does not cut it short."""
    store, queue = store_of(bench), bench.queue.id
    acknowledge(store, queue, ["a"], HOUR_MS)
    acknowledge(store, queue, ["b"], 1000)
    with closing(redis.Redis.from_url(bench.broker.url)) as client:
        left: Any = client.pttl(prefix(queue) + "k")

    assert HOUR_MS - 60_000 < left <= HOUR_MS


@ON_STORES
def test_purging_keeps_and_deleting_forgets(bench: Bench) -> None:
    """Purging a queue forgets no completed id; deleting it forgets all of them, and leaves nothing behind."""
    queue = bench.declare("signed", replay_window=HOUR)
    store = store_of(bench)
    complete(bench, queue)

    bench.backend.purge(queue)
    assert store.completed(queue.id, ["a"]) == {"a"}
    store.delete(queue.id)
    assert store.arguments(queue.id) is None
    assert remembered(store, queue.id) == 0
    bench.backend.declare(queue, create=True, exact=True)
    assert store.completed(queue.id, ["a"]) == set()


@ON_STORES
def test_nothing_is_delivered_unchecked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store cannot say what has been completed, a fetch fails and its messages are back at their places."""
    queue = bench.declare("signed", replay_window=HOUR)
    complete(bench, queue)
    bench.publish(bench.message("a", queue=queue), bench.message("b", queue=queue))
    feed = bench.feed(queue)
    assert isinstance(feed, StoredFeed)

    def fail(*_: Any) -> set[str]:
        raise BrokerAway("gone", details={"reason": "unavailable"})

    with monkeypatch.context() as patch:
        patch.setattr(feed._store, "completed", fail)
        with pytest.raises(BrokerAway):
            feed.fetch(10, {})

    found = [(d.id, d.replayed, d.deliveries) for d in bench.take(feed, 2, within=0.5)]
    assert found == [("a", True, 0), ("b", False, 0)]


@pytest.mark.parametrize("auto_ack", [False, True])
def test_a_replayed_message_does_not_run(
    make_app: Callable[..., kq.App], broker: Broker, queue_id: str, auto_ack: bool
) -> None:
    """A copy of a signed message that is done does not run again; on RabbitMQ, which cannot remember, it does."""
    app = make_app(signing=kq.Signing({"k1": "x" * 32}, "k1", require=True))
    ran: list[Any] = []
    app.consumer(queue_id, auto_ack=auto_ack)(ran.append)
    id = app.publish(queue_id, {"n": 1})
    with closing(open_backend(Settings(broker=broker.url), "test")) as stranger:
        (envelope,) = stranger.browse(QueueSpec(queue_id), 10, 0)
        assert app.drain(20.0) == 1
        assert ran == [{"n": 1}]
        if broker.stores:
            broker.put_raw(queue_id, pack(envelope))
        else:
            assert stranger.publish([Publication(QueueSpec(queue_id), envelope)], 10.0) == [None]
    app.drain(20.0)

    if not broker.stores:
        assert ran == [{"n": 1}, {"n": 1}]
        return
    assert ran == [{"n": 1}]
    if not auto_ack:
        (letter,) = app.dead(queue_id).list()
        assert (letter.id, letter.reason) == (id, "unverified")
        assert "replayed" in str(letter.error_message)


def test_a_puller_gets_no_replayed_message(make_app: Callable[..., kq.App], broker: Broker, queue_id: str) -> None:
    """Whoever pulls a queue that requires signatures is not handed a copy of what is done."""
    app = make_app(signing=kq.Signing({"k1": "x" * 32}, "k1", require=True))
    app.queue(queue_id)
    app.publish(queue_id, {"n": 1}, message_id="first")
    with closing(open_backend(Settings(broker=broker.url), "test")) as stranger:
        (envelope,) = stranger.browse(QueueSpec(queue_id), 10, 0)
        with kq.Consumer(app, queue_id) as consumer:
            message = consumer.receive(20.0)
            assert message is not None
            message.ack()
        assert stranger.publish([Publication(QueueSpec(queue_id), envelope)], 10.0) == [None]
    app.publish(queue_id, {"n": 2}, message_id="second")

    with kq.Consumer(app, queue_id) as consumer:
        found = consumer.receive(20.0)
        assert found is not None
        assert found.id() == ("second" if broker.stores else "first")
