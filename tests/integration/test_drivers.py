"""Apps whose queues live on several brokers."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import pytest

import kq
from kq import errors, queue
from tests import broker as brokers
from tests.broker import Broker
from tests.integration.conftest import Shop, wait_for
from tests.proxy import Proxy


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Shop]:
    """A shop with queues on SQLite, Redis and RabbitMQ, and a publisher that knows them."""
    redis, rabbit = brokers.find("redis", tmp_path), brokers.find("rabbitmq", tmp_path)
    shop = Shop(brokers.find("sqlite", tmp_path), tmp_path)
    shutil.copy(Path(__file__).with_name("three.py"), tmp_path / "three.py")
    shop.environment |= {"KQ_TEST_REDIS_URL": redis.url, "KQ_TEST_AMQP_URL": rabbit.url}
    redis.used.append(shop.queue + "-redis")
    rabbit.used.append(shop.queue + "-rabbit")
    shop.app.close()
    shop.app = kq.App("publisher", broker=shop.broker.url, drivers={"redis": redis.url, "rabbit": rabbit.url})
    shop.app.queue(shop.queue + "-here")
    shop.app.queue(shop.queue + "-redis", driver="redis", max_attempts=1)
    shop.app.queue(shop.queue + "-rabbit", driver="rabbit")
    yield shop
    shop.close()
    redis.forget()
    rabbit.forget()


def queues_of(shop: Shop) -> list[str]:
    """Return the shop's queues, one on each broker."""
    return [shop.queue + suffix for suffix in ("-here", "-redis", "-rabbit")]


def test_one_worker_serves_three_brokers(three: Shop) -> None:
    """One worker handles what is published to queues on SQLite, Redis and RabbitMQ, and says where they are."""
    worker = three.worker("-p", "2", app="three:app")
    for queue_id in queues_of(three):
        three.app.publish_many(queue_id, [{"n": n} for n in range(20)])

    wait_for(lambda: len(three.history()) == 60, "all of them")

    assert Counter(line["event"] for line in three.history()) == dict.fromkeys(queues_of(three), 20)
    log = three.log()
    assert f"broker  {three.broker.url}\n" in log
    assert "broker  redis://" in log
    assert f"{three.queue}-rabbit  ->  handle  (on rabbit)" in log
    assert "guest:guest" not in log
    assert three.stop(worker) == 0
    wait_for(lambda: all(three.app.info(id).message_count == 0 for id in queues_of(three)), "empty queues")


def test_burst_ends_when_all_brokers_are_empty(three: Shop) -> None:
    """With --burst a worker sees a chain through that goes from broker to broker, and only then ends."""
    for queue_id in queues_of(three):
        three.app.publish_many(queue_id, [{"n": n} for n in range(10)])
    three.app.publish(three.queue + "-here", {"n": "chain", "hops": 7, "seconds": 0.3})
    worker = three.worker("-p", "1", "--burst", app="three:app", ready=False)

    assert worker.wait(60) == 0, three.log()

    chain = [line["event"].removeprefix(three.queue) for line in three.history(n="chain")]
    assert chain == ["-here", "-redis", "-rabbit", "-here", "-redis", "-rabbit", "-here", "-redis"]
    assert len(three.history()) == 30 + 8
    assert [three.app.info(queue_id).message_count for queue_id in queues_of(three)] == [0, 0, 0]


def test_commands_know_where_a_queue_lives(three: Shop) -> None:
    """Publishing, info, dead letters and purge on the command line go to the queue's own broker; check reaches all."""
    published = three.run("publish", three.queue + "-redis", '{"n": 1, "fail": true}', "-A", "three:app")
    assert published.returncode == 0, published.stderr
    assert three.app.info(three.queue + "-redis").ready == 1
    three.worker("-p", "1", "--burst", app="three:app", ready=False).wait(60)

    listed = three.run("dead", "list", three.queue + "-redis", "-A", "three:app")
    checked = three.run("check", "-A", "three:app")

    assert published.stdout.strip() in listed.stdout
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": reached") == 3
    assert "driver         redis\n" in checked.stdout
    assert three.run("purge", three.queue + "-rabbit", "--yes", "-A", "three:app").returncode == 0


@pytest.mark.parametrize("command", [["worker", "three:app", "--connect-timeout", "0.5"], ["check", "-A", "three:app"]])
def test_a_broker_that_is_away_is_named(three: Shop, command: list[str]) -> None:
    """A command that cannot reach one of the brokers ends with 69 and says which driver it is."""
    done = three.run(*command, KQ_TEST_REDIS_URL="redis://127.0.0.1:1")

    assert done.returncode == 69
    assert "kq: driver redis: " in done.stderr


def test_a_queue_needs_a_declared_driver() -> None:
    """A queue on an unknown driver, and a driver on an unknown broker, are Invalid where they are declared."""
    app = kq.App("test", broker="memory://", drivers={"a:b": "memory://other"})
    assert app.queue("app:a", driver="a:b").driver == "a:b"
    with pytest.raises(errors.Invalid, match=r"declares \('a:b'\), got 'c'"):
        app.queue("app:b", driver="c")
    with pytest.raises(errors.Invalid, match=r"driver x: .*kafka"):
        kq.App("test", broker="memory://", drivers={"x": "kafka://host"})


# In this process.


@pytest.fixture
def make_app(broker: Broker) -> Iterator[Callable[..., kq.App]]:
    """Makes apps on memory whose second driver is the broker."""
    apps: list[kq.App] = []

    def make(**settings: Any) -> kq.App:
        app = kq.App("test", broker=f"memory://{uuid4().hex}", drivers={"far": broker.url}, **settings)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


@pytest.fixture
def app(make_app: Callable[..., kq.App]) -> kq.App:
    """An app on memory whose second driver is the broker."""
    return make_app()


def near_id() -> str:
    """The id of a queue in memory."""
    return f"near:{uuid4().hex}"


def test_draining_spans_brokers(app: kq.App, queue_id: str) -> None:
    """app.drain() handles everything on every broker, also a chain that goes to and fro."""
    near = near_id()
    app.queue(queue_id, driver="far")
    seen: list[tuple[str, int]] = []

    def pass_on(payload: Any) -> None:
        me = queue.message().queue_id()
        seen.append((me, payload["hops"]))
        if payload["hops"]:
            queue.publish(queue_id if me == near else near, {"hops": payload["hops"] - 1})

    app.consumer(near)(pass_on)
    app.consumer(queue_id)(pass_on)
    app.publish(near, {"hops": 20})

    assert app.drain(30) == 21
    assert seen == [(near if hops % 2 == 0 else queue_id, hops) for hops in range(20, -1, -1)]


def test_draining_waits_for_what_is_due_elsewhere(app: kq.App, queue_id: str) -> None:
    """app.drain() does not end while a delayed message of one broker is due, nor before what comes of it is done."""
    near = near_id()
    app.queue(queue_id, driver="far")
    seen: list[Any] = []
    app.consumer(queue_id)(lambda payload: seen.append(queue.publish(near, {"n": 2})))
    app.consumer(near)(seen.append)
    app.publish(near, {"n": 1})
    app.publish(queue_id, {"n": 1}, delay=0.3)

    assert app.drain(30) == 3
    assert (seen[0], seen[2]) == ({"n": 1}, {"n": 2})


def test_dead_letters_stay_with_their_queue(app: kq.App, queue_id: str) -> None:
    """Dead letters of a queue on a second driver are listed, counted, replayed and purged there."""
    app.queue(queue_id, driver="far", max_attempts=1)
    broken = True

    @app.consumer(queue_id)
    def handle(payload: Any) -> None:
        if broken:
            raise errors.Invalid("never")

    ids = app.publish_many(queue_id, [{"n": n} for n in range(2)])
    app.drain(30)

    assert sorted(letter.id for letter in app.dead(queue_id).list()) == sorted(ids)
    assert app.info(queue_id).dead == 2
    assert app.dead(queue_id).purge(ids[:1]) == 1
    assert app.dead(queue_id).get(ids[1]).payload == {"n": 1}
    broken = False
    assert app.dead(queue_id).replay() == 1
    assert app.drain(30) == 1
    assert app.info(queue_id).dead == 0
    near = app.registry.backend()
    with pytest.raises(errors.NotFound):
        near.info(app.registry.spec(queue_id))
    with pytest.raises(errors.NotFound):
        near.info(app.registry.spec(queue_id + ".dead"))


def test_dead_letters_elsewhere_can_be_handled(app: kq.App, queue_id: str) -> None:
    """A consumer of a dead-letter queue finds it on the driver of the queue it belongs to."""
    seen: list[Any] = []
    app.consumer(queue_id + ".dead")(seen.append)
    app.queue(queue_id, driver="far", max_attempts=1)

    @app.consumer(queue_id)
    def handle(payload: Any) -> None:
        raise errors.Invalid("never")

    app.publish(queue_id, {"n": 1})
    app.drain(30)

    assert seen == [{"n": 1}]


def test_pulling_from_several_brokers(app: kq.App, queue_id: str) -> None:
    """One consumer receives from queues on several brokers, and settles each message where it came from."""
    near = near_id()
    app.queue(queue_id, driver="far")
    for id in (near, queue_id):
        app.publish_many(id, [{"n": n} for n in range(5)])
    with kq.Consumer(app, [near, queue_id], prefetch=2) as consumer:
        received = Counter[str]()
        for _ in range(10):
            message = consumer.receive(timeout=20)
            assert message is not None
            received[message.queue_id()] += 1
            message.ack()

    assert received == {near: 5, queue_id: 5}
    wait_for(lambda: app.info(near).message_count + app.info(queue_id).message_count == 0, "the settlements")


def test_purging_goes_to_the_queues_broker(app: kq.App, queue_id: str) -> None:
    """app.purge() drops what waits on the queue's own driver."""
    app.queue(queue_id, driver="far")
    app.publish_many(queue_id, [{"n": n} for n in range(3)])

    assert app.purge(queue_id) == 3
    assert app.info(queue_id).ready == 0


def test_memory_in_the_worker_needs_threads(tmp_path: Path) -> None:
    """A consumed queue in memory keeps handlers in this process; one that is not consumed does not."""
    app = kq.App("test", broker=f"sqlite:///{tmp_path}/kq.db", drivers={"near": f"memory://{uuid4().hex}"})
    app.queue("app:near", driver="near")
    app.consumer("app:near")(lambda payload: None)
    app.consumer("app:far")(lambda payload: None)
    with pytest.raises(errors.Invalid, match="pool: memory:// lives in one process"):
        app.worker(app_path="a:b", pool="processes")
    app.worker(app_path="a:b", pool="processes", queues=["app:far"])


def test_a_broker_that_hangs_keeps_nobody_from_publishing(tmp_path: Path) -> None:
    """While one thread waits for a broker that does not answer, others publish to another broker."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(30)
        url = f"redis://127.0.0.1:{mute.getsockname()[1]}/0"
        app = kq.App("test", broker=f"sqlite:///{tmp_path}/kq.db", drivers={"mute": url}, publish_timeout=3.0)
        app.queue("app:mute", driver="mute")
        failed: list[errors.Error] = []

        def publish() -> None:
            try:
                app.publish("app:mute", {"n": 1})
            except errors.Error as error:
                failed.append(error)

        thread = Thread(target=publish)
        thread.start()
        connection, _ = mute.accept()
        with connection:
            ids = [app.publish("app:near", {"n": n}) for n in range(5)]
            assert thread.is_alive()
            thread.join(30)
        assert len(set(ids)) == 5
        assert [error.details["reason"] for error in failed] in (["timeout"], ["unavailable"])
        app.close()


def test_a_broker_that_hangs_keeps_no_task_from_publishing(tmp_path: Path) -> None:
    """However many tasks wait for a broker that does not answer, those that publish to another do not."""

    async def publish(app: kq.App, mute: socket.socket) -> list[Any]:
        hanging = [asyncio.create_task(app.apublish("app:mute", {"n": n})) for n in range(40)]
        connection, _ = await asyncio.to_thread(mute.accept)
        with connection:
            ids = await asyncio.gather(*(app.apublish("app:near", {"n": n}) for n in range(5)))
            assert len(set(ids)) == 5
            assert not any(task.done() for task in hanging)
            return await asyncio.gather(*hanging, return_exceptions=True)

    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(30)
        url = f"redis://127.0.0.1:{mute.getsockname()[1]}/0"
        app = kq.App("test", broker=f"sqlite:///{tmp_path}/kq.db", drivers={"mute": url}, publish_timeout=2.0)
        app.queue("app:mute", driver="mute")
        failed = asyncio.run(publish(app, mute))
        assert all(isinstance(error, errors.Internal) for error in failed)
        app.close()


@pytest.mark.parametrize("name", ["redis", "rabbitmq"])
def test_a_broker_that_goes_away_keeps_nobody_from_working(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """When one broker is lost the worker says which, goes on with the other's messages, and takes it up again."""
    broker = brokers.find(name, tmp_path)
    far, near = broker.queue_id(), near_id()
    handled, back = Event(), Event()
    with closing(Proxy(broker.url)) as proxy, caplog.at_level(logging.INFO, "kq.worker"):
        app = kq.App(
            "test",
            broker=f"memory://{uuid4().hex}",
            drivers={"far": kq.Driver(proxy.url, reconnect_initial=0.05, reconnect_max=0.05)},
        )
        app.queue(far, driver="far")
        app.consumer(far)(lambda payload: back.set())
        app.consumer(near)(lambda payload: handled.set())
        with app.worker():
            proxy.close()
            wait_for(lambda: "the broker of driver far is away" in caplog.text, "the loss")
            app.publish(near, {"n": 1})
            assert handled.wait(20)
            with kq.App("other", broker=broker.url) as other:
                other.publish(far, {"n": 2})
            proxy.reopen()
            assert back.wait(20)
        app.close()
    broker.forget()
