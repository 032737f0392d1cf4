from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

import kq
from kq.backend import Publication
from kq.backends.redis import RedisStore
from kq.backends.stored import StoredBackend
from tests.account import account
from tests.broker import Broker
from tests.conformance.conftest import ON_REDIS, ON_STORES, Bench

MakeApp = Callable[..., kq.App]


def long_message(bench: Bench, id: str) -> Publication:
    """Return a message that is stored in another way than short ones."""
    message = bench.message(id)
    message.envelope.body = b'"%b"' % (b"x" * 200_000)
    return message


def test_large_and_small_messages_mix(make_app: MakeApp, broker: Broker, queue_id: str) -> None:
    """Every body arrives as it was, whatever the sizes of those before it; what strangers put there as well."""
    app = make_app()
    seen: Counter[tuple[int, int]] = Counter()

    @app.consumer(queue_id)
    def handle(payload: dict[str, str]) -> None:
        seen[int(payload["n"]), len(payload["text"])] += 1

    sizes = [10, 20_000, 10, 300_000, 5_000, 0, 1_500] * 6
    published = Counter((n, size) for n, size in enumerate(sizes))
    # Large ones first, so that those that follow come to a worker that expects large ones.
    for n, size in sorted(enumerate(sizes), key=lambda pair: -pair[1]):
        app.publish(queue_id, {"n": str(n), "text": "x" * size})
        if n % 14 == 0:
            broker.put_raw(queue_id, b"not ours %d" % n)
    assert app.drain() == len(sizes) + 3
    assert seen == published
    assert {letter.reason for letter in app.dead(queue_id).list()} == {"undecodable"}


def test_what_has_expired_is_not_run_among_large_ones(make_app: MakeApp, queue_id: str) -> None:
    """Marks of a message do not depend on how its body is fetched."""
    app = make_app()
    seen = []
    app.consumer(queue_id)(lambda payload: seen.append(payload[0]))
    for n in range(6):
        app.publish(queue_id, [n, "x" * 50_000], expires=0.001 if n % 2 else None)
    app.drain()
    assert sorted(seen) == [0, 2, 4]
    assert app.info(queue_id).dead == 3


@ON_STORES
def test_a_long_message_is_stored_once(bench: Bench) -> None:
    """A second one of its id has no effect while it is there, and one while it runs has none either."""
    bench.publish(long_message(bench, "a"))
    bench.publish(long_message(bench, "a"), bench.message("b"))
    feed = bench.feed()
    assert sorted(delivery.id for delivery in bench.take(feed, 2)) == ["a", "b"]
    bench.publish(long_message(bench, "a"))
    assert bench.backend.info(bench.queue).message_count == 2
    assert bench.take(feed, 1, within=0.2) == []


@ON_STORES
def test_a_long_message_to_a_queue_that_was_deleted_leaves_nothing(bench: Bench) -> None:
    """It is refused, and stored under the same id once the queue is there again."""
    bench.delete(bench.queue.id)
    (error,) = bench.backend.publish([long_message(bench, "a")], 10.0)
    assert error is not None
    assert error.details["reason"] == "unroutable"

    bench.backend.declare(bench.queue, create=True, exact=True)
    bench.publish(long_message(bench, "a"))

    assert [delivery.id for delivery in bench.take(bench.feed(), 1)] == ["a"]


@ON_REDIS
@pytest.mark.parametrize("missing", [(), ("-multi",), ("-exec",), ("-multi", "-exec")], ids=" ".join)
def test_long_messages_need_no_transactions(bench: Bench, missing: tuple[str, ...]) -> None:
    """An account that may not use transactions publishes all the same, and nothing is stored twice or by half."""
    with account(bench.broker, lambda name: [["~*", "&*", "+@all", *missing]]) as url:
        mine = Bench(Broker(bench.broker.name, url, bench.broker.used), lease=bench.lease)
        try:
            mine.publish(long_message(mine, "a"))
            mine.publish(mine.message("b"), long_message(mine, "c"))
            mine.publish(long_message(mine, "d"))
            assert isinstance(mine.backend, StoredBackend)
            store = mine.backend._store()
            assert isinstance(store, RedisStore)
            assert store._putter.transacts is (not missing)
            feed = mine.feed()
            assert [delivery.id for delivery in mine.take(feed, 4)] == ["a", "b", "c", "d"]
            assert mine.take(feed, 1, within=0.2) == []
        finally:
            for feed in mine.feeds:
                feed.close()
            mine.backend.close()
