"""The least rights that ``kq check --acl`` prints: enough for their role, and no more."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import amqp
import pytest
import redis

import kq
from kq import errors
from kq.backend import Granting, Role, Settlement, insist
from kq.config import Settings
from kq.envelope import clean
from kq.outcome import Failure, Outcome
from kq.queue_spec import default_spec
from kq.scheme import open_backend
from tests.account import account
from tests.broker import Broker
from tests.conformance.conftest import LEASE, ON_RABBITMQ, ON_REDIS, Bench

ON_THE_NETWORK = pytest.mark.parametrize("broker", ["redis", "rabbitmq"], indirect=True)
#: For one queue only, and for all.
NARROW_AND_WIDE = pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])


def printed(bench: Bench, role: Role, queues: list[str]) -> list[list[str]]:
    """Return the rules of an account as they are printed, taken apart as the broker's own tool does."""
    assert isinstance(bench.backend, Granting)
    text = bench.backend.acl(role, queues)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    if bench.broker.name == "redis":
        return [line.split(" on >PASSWORD ")[1].split() for line in lines]
    return [shlex.split(line)[-3:] for line in lines]


@contextmanager
def as_account(bench: Bench, role: Role, narrow: bool) -> Iterator[Broker]:
    """Yield the broker as an account with the printed rights sees it."""
    assert bench.queue.dead_letter is not None
    queues = [bench.queue.id, bench.queue.dead_letter] if narrow else []
    with account(bench.broker, lambda name: printed(bench, role, queues)) as url:
        yield Broker(bench.broker.name, url, bench.broker.used)


def settle(bench: Bench, feed: Any, outcome: Outcome) -> None:
    """Take one message and end it so."""
    (delivery,) = bench.take(feed, 1)
    assert feed.settle([Settlement(delivery, outcome)]) == ([], [])


@ON_REDIS
def test_what_cannot_be_checked_endangers_messages(bench: Bench) -> None:
    """An account that may ask Redis for nothing is told so, and ``durability: required`` takes that for a no."""
    with as_account(bench, "worker", narrow=True) as broker:
        backend = open_backend(Settings(broker=broker.url), "test")
        with closing(backend):
            (warning,) = backend.check()
            assert "cannot be checked" in warning
            with pytest.raises(errors.Invalid, match="cannot be checked"):
                insist([warning])
    rules = [[*rule, "+info"] for rule in printed(bench, "worker", [bench.queue.id])]
    with account(bench.broker, lambda name: rules) as url:
        backend = open_backend(Settings(broker=url), "test")
        with closing(backend):
            assert not any("cannot be checked" in warning for warning in backend.check())


@ON_THE_NETWORK
@NARROW_AND_WIDE
def test_a_worker_can_do_everything(bench: Bench, narrow: bool) -> None:
    """Under the worker's rights all that is done to a queue works: what the contract has, and what apps do."""
    queue = bench.queue
    with as_account(bench, "worker", narrow) as broker:
        mine = Bench.__new__(Bench)
        mine.broker, mine.lease, mine.feeds, mine.queue = broker, LEASE, [], queue
        mine.backend = kq.App("acl", broker=broker.url, lease=LEASE).registry.open()
        backend = mine.backend
        try:
            backend.check()
            bench.delete(queue.id)
            assert queue.dead_letter is not None
            bench.delete(queue.dead_letter)
            backend.declare(queue, create=True, exact=True)
            mine.publish(*[mine.message(f"m{n}", priority=n) for n in range(6)], mine.message("later", delay=0.2))
            mine.publish(mine.message("far", delay=600.0))
            feed = mine.feed()
            feed.renew()
            settle(mine, feed, Outcome("done", 0.0, 1, 0))
            settle(mine, feed, Outcome("retry", 0.1, 1, 0))
            settle(mine, feed, Outcome("retry", 0.0, 1, 1))
            settle(mine, feed, Outcome("release", 0.0, 0, 0))
            dead = Outcome("dead", 0.0, 1, 0, "not_retryable", Failure("INVALID", "no", False))
            settle(mine, feed, dead)
            settle(mine, feed, dead)
            feed.due_in()
            held = mine.take(feed, 1)
            feed.renew()
            assert held
            feed.close()
            assert backend.info(queue).dead == 2
            letters = backend.browse(mine.dead, 10, 0)
            assert len(letters) == 2
            assert backend.replay(mine.dead, [letters[0].id], queue, clean) == 1
            assert backend.remove(mine.dead, [letters[1].id]) == 1
            assert backend.remove(mine.dead, None) == 0
            assert backend.purge(queue) >= 1
        finally:
            for one in mine.feeds:
                one.close()
            backend.close()


@ON_THE_NETWORK
@NARROW_AND_WIDE
def test_a_publisher_can_publish(bench: Bench, narrow: bool) -> None:
    """Under the publisher's rights messages are stored, also late, in priority and many at once."""
    bench.backend.declare(default_spec(bench.queue.id), create=True, exact=False)
    with (
        as_account(bench, "publisher", narrow) as broker,
        kq.App("acl", broker=broker.url) as app,
    ):
        app.queue(bench.queue.id)
        app.publish(bench.queue.id, {"n": 1}, {"priority": "high"}, message_id="a")
        app.publish(bench.queue.id, {"n": 2}, message_id="b")
        app.publish(bench.queue.id, {"n": 3}, delay=0.2, message_id="c")
        app.publish_many(bench.queue.id, [{"n": n} for n in range(1200)], {"tenant": "t"})
        app.registry.backend().check()
    delivered = bench.take(bench.feed(prefetch=2000), 1203)
    assert len(delivered) == 1203
    assert {"a", "b", "c"} <= {delivery.id for delivery in delivered}


@ON_REDIS
@pytest.mark.parametrize(
    ("more", "may_put"),
    [([], -1), (["+multi", "+exec"], -1), (["+multi", "+exec", "(+llen ~{kq:*}:r:*)"], 1)],
    ids=["least", "transactions", "all"],
)
def test_a_publisher_can_publish_long_messages(bench: Bench, more: list[str], may_put: int) -> None:
    """Under the least rights, and with those of use; whether its list would take an id is asked with all of them."""
    bench.backend.declare(default_spec(bench.queue.id), create=True, exact=False)
    with (
        account(bench.broker, lambda name: [[*rule, *more] for rule in printed(bench, "publisher", [])]) as url,
        kq.App("acl", broker=url) as app,
    ):
        for id in ("a", "b", "a"):
            app.publish(bench.queue.id, "x" * 100_000, message_id=id)
        store = app.registry.backend()._store()  # type: ignore[attr-defined]
        # Or an old server says so.
        assert store._caller.run("MAY_PUT", (f"{{kq:{bench.queue.id}}}:",), ()) in (may_put, -2)
    feed = bench.feed()
    assert [delivery.id for delivery in bench.take(feed, 2)] == ["a", "b"]
    assert bench.take(feed, 1, within=0.2) == []


@ON_REDIS
def test_a_publisher_can_declare_on_redis(bench: Bench) -> None:
    """On Redis a publisher makes the queue that it publishes to, and respects its length."""
    with as_account(bench, "publisher", False) as broker, kq.App("acl", broker=broker.url) as app:
        queue = broker.queue_id("own")
        app.queue(queue, max_length=2)
        app.publish_many(queue, [1, 2])
        with pytest.raises(errors.Internal, match="full"):
            app.publish(queue, 3)


@ON_THE_NETWORK
def test_who_is_refused_may_publish_again(bench: Bench) -> None:
    """An account that the broker does not let in, yet or any more, is nothing that a handler's message need die of."""
    parts = urlsplit(bench.broker.url)
    url = parts._replace(netloc=f"nobody:wrong@{parts.netloc.rpartition('@')[2]}").geturl()
    with kq.App("refused", broker=url) as app:
        for publish in (
            lambda: app.publish(bench.queue.id, 1),
            lambda: app.publish_many(bench.queue.id, [1, 2]),
            lambda: asyncio.run(app.apublish(bench.queue.id, 1)),
        ):
            with pytest.raises(errors.Internal) as caught:
                publish()
            assert caught.value.retryable
            assert (caught.value.details["reason"], caught.value.details["published"]) == ("refused", [])
        with pytest.raises(errors.PermissionDenied):
            app.info(bench.queue.id)


@ON_RABBITMQ
def test_a_publisher_needs_a_worker_first_on_rabbitmq(bench: Bench) -> None:
    """On RabbitMQ a publisher makes no queue, and is told so where there is none."""
    with as_account(bench, "publisher", False) as broker, kq.App("acl", broker=broker.url) as app:
        queue = broker.queue_id("own")
        with pytest.raises(errors.Internal, match=f"queue {queue} does not exist.*start a worker") as caught:
            app.publish(queue, 1)
        assert caught.value.details["reason"] == "refused"


@ON_THE_NETWORK
@NARROW_AND_WIDE
def test_a_publisher_cannot_read(bench: Bench, narrow: bool) -> None:
    """Under the publisher's rights no message is read, taken, moved or dropped, neither by kq nor past it."""
    app_queue = bench.queue
    bench.publish(bench.message("secret"), bench.message("secret-too"))
    with as_account(bench, "publisher", narrow) as broker:
        backend = kq.App("acl", broker=broker.url).registry.open()
        calls: list[Callable[[], Any]] = [
            lambda: backend.browse(app_queue, 10, 0),
            lambda: backend.purge(app_queue),
            lambda: backend.remove(app_queue, ["secret"]),
            lambda: backend.replay(bench.dead, None, app_queue, clean) or backend.browse(bench.dead, 1, 0),
        ]
        try:
            for call in calls:
                with pytest.raises(errors.PermissionDenied):
                    call()
            with pytest.raises(errors.PermissionDenied):
                _consume(backend, app_queue)
        finally:
            backend.close()
        if broker.name == "redis":
            _read_past_kq_on_redis(broker.url, app_queue.id)
        else:
            _read_past_kq_on_rabbitmq(broker.url, app_queue.id)
    assert bench.backend.info(app_queue).ready == 2


def _consume(backend: Any, queue: Any) -> None:
    feed = backend.feed([queue], 10)
    try:
        assert feed.fetch(10, {}) == []
        feed.wait(1.0)
        assert feed.fetch(10, {}) == []
    finally:
        feed.close()


def _read_past_kq_on_redis(url: str, queue: str) -> None:
    bodies = f"{{kq:{queue}}}:m"
    commands: list[list[Any]] = [
        ["HGETALL", bodies], ["HGET", bodies, "secret"], ["HVALS", bodies], ["HSCAN", bodies, 0], ["DUMP", bodies],
        ["HRANDFIELD", bodies, 1, "WITHVALUES"], ["HSET", bodies, "secret", "forged"], ["DEL", bodies],
        ["SET", bodies, "x"], ["GET", bodies], ["RENAME", bodies, bodies + "2"],
        ["LRANGE", f"{{kq:{queue}}}:r:4", 0, -1],
        ["ZRANGE", bodies, 0, -1], ["KEYS", "*"], ["SCAN", 0], ["MONITOR"], ["CONFIG", "GET", "*"], ["FLUSHALL"],
        ["SUBSCRIBE", "x"], ["SCRIPT", "LOAD", "return 1"], ["SET", f"{{kq:{queue}}}:q", "{}"], ["SELECT", 0, 0],
        ["HSETNX", "other", "a", "b"], ["GET", "other"], ["ACL", "WHOAMI"],
    ]  # fmt: skip
    with closing(redis.Redis.from_url(url)) as client:
        for command in commands:
            with pytest.raises(redis.exceptions.ResponseError):
                client.execute_command(*command)  # type: ignore[no-untyped-call]
        for command in commands[:12]:
            # A script has the rights of who calls it.
            words = ", ".join(repr(word) for word in command)
            with pytest.raises(redis.exceptions.ResponseError):
                client.eval(f"return redis.call({words})", 1, f"{{kq:{queue}}}:")


def _read_past_kq_on_rabbitmq(url: str, queue: str) -> None:
    parts = urlsplit(url)
    calls: list[Callable[[Any], Any]] = [
        lambda channel: channel.basic_get(queue),
        lambda channel: channel.basic_get(queue + ".dead"),
        lambda channel: channel.basic_consume(queue),
        lambda channel: channel.queue_purge(queue),
        lambda channel: channel.queue_delete(queue),
        lambda channel: channel.queue_declare(queue + "-mine"),
        lambda channel: channel.queue_bind(queue, "amq.direct", "x"),
        lambda channel: channel.exchange_declare(queue + "-mine", "fanout", auto_delete=False),
    ]
    connection = amqp.Connection(
        host=f"{parts.hostname}:{parts.port or 5672}", userid=parts.username, password=parts.password,
        virtual_host=parts.path.lstrip("/") or "/",
    )  # fmt: skip
    connection.connect()
    try:
        for call in calls:
            with pytest.raises(amqp.exceptions.AccessRefused):
                call(connection.channel())
    finally:
        connection.close()


@ON_THE_NETWORK
def test_narrow_rights_end_at_the_queue(bench: Bench) -> None:
    """A worker whose rights name its queues has none on others."""
    other = bench.declare("other")
    bench.publish(bench.message(queue=other))
    with as_account(bench, "worker", True) as broker:
        backend = kq.App("acl", broker=broker.url).registry.open()
        try:
            for call in (lambda: backend.browse(other, 10, 0), lambda: backend.purge(other)):
                with pytest.raises(errors.PermissionDenied):
                    call()
        finally:
            backend.close()


@ON_REDIS
def test_a_publisher_on_old_redis(bench: Bench) -> None:
    """The rule for Redis 6.2, without selectors, lets publish and lets no message be read."""
    from kq.backends import redis_acl

    text = bench.backend.acl("publisher", [])  # type: ignore[attr-defined]
    words = redis_acl.rules("publisher", [], selectors=False)
    assert " ".join(words) in text
    assert not any("(" in word for word in words)
    with account(bench.broker, lambda name: [words]) as url, kq.App("acl", broker=url) as app:
        app.publish(bench.queue.id, {"n": 1}, {"priority": 9}, delay=0.01)
        with pytest.raises(errors.PermissionDenied):
            app.registry.backend().browse(bench.queue, 1, 0)
        with closing(redis.Redis.from_url(url)) as client, pytest.raises(redis.exceptions.NoPermissionError):
            client.hgetall(f"{{kq:{bench.queue.id}}}:m")


@pytest.mark.parametrize("broker", ["memory", "sqlite"], indirect=True)
def test_where_there_are_no_accounts(bench: Bench) -> None:
    """Brokers without accounts say so, and what there is instead."""
    assert isinstance(bench.backend, Granting)
    for role in ("publisher", "worker"):
        text = bench.backend.acl(role, [])
        assert all(line.startswith("#") for line in text.splitlines())
        assert re.search("nothing to grant|permissions of the folder", text)
