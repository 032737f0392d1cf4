"""Other programs on the same broker: what they publish is handled, what we publish they can read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from time import monotonic
from urllib.parse import urlsplit

import kombu
import pika
import pytest

import kq
from kq import queue
from tests.broker import Broker, find


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Broker:
    """RabbitMQ."""
    return find("rabbitmq", tmp_path)


def pika_channel(url: str) -> tuple[pika.BlockingConnection, object]:
    """Connect with pika, which shares no code with us."""
    parts = urlsplit(url)
    credentials = pika.PlainCredentials(parts.username or "guest", parts.password or "guest")
    parameters = pika.ConnectionParameters(parts.hostname, parts.port or 5672, "/", credentials)
    connection = pika.BlockingConnection(parameters)
    return connection, connection.channel()


def test_pika_publishes_kq_handles(rabbitmq: Broker) -> None:
    """Plain JSON from pika, with standard properties and its own headers, is handled like any message."""
    queue_id = rabbitmq.queue_id()
    seen = []
    with kq.App("test", broker=rabbitmq.url) as app:

        @app.consumer(queue_id)
        def handle(payload: object) -> None:
            msg = queue.message()
            seen.append((payload, msg.id(), msg.header("tenant"), msg.attempt()))

        app.publish(queue_id, "warm-up")
        connection, channel = pika_channel(rabbitmq.url)
        properties = pika.BasicProperties(
            content_type="application/json", message_id="from-pika", headers={"tenant": "t"}
        )
        channel.basic_publish("", queue_id, b'{"hello": "kq"}', properties)  # type: ignore[attr-defined]
        connection.close()
        while len(seen) < 2:
            assert app.drain(20)
    rabbitmq.forget()

    assert seen[1] == ({"hello": "kq"}, "from-pika", "t", 1)


def test_kq_publishes_pika_reads(rabbitmq: Broker) -> None:
    """What kq publishes is plain JSON with standard AMQP properties."""
    queue_id = rabbitmq.queue_id()
    with kq.App("test", broker=rabbitmq.url) as app:
        headers: dict[str, object] = {"correlation_id": "c-1", "reply_to": "app:replies", "message_type": "greeting"}
        headers.update(priority=7, n=5)
        id = app.publish(queue_id, {"hello": "pika"}, headers)
    connection, channel = pika_channel(rabbitmq.url)
    _, properties, body = channel.basic_get(queue_id, auto_ack=True)  # type: ignore[attr-defined]
    connection.close()
    rabbitmq.forget()

    assert json.loads(body) == {"hello": "pika"}
    assert properties.message_id == id
    assert (properties.content_type, properties.content_encoding) == ("application/json", "utf-8")
    assert (properties.correlation_id, properties.reply_to, properties.type) == ("c-1", "app:replies", "greeting")
    assert (properties.delivery_mode, properties.priority) == (2, 7)
    assert properties.timestamp > 1_700_000_000
    # RabbitMQ adds a count of its own.
    found = {key: value for key, value in properties.headers.items() if key != "x-delivery-count"}
    assert found == {**headers, "x_kq": 1}


@pytest.mark.parametrize("name", ["memory", "sqlite", "redis"])
def test_plain_kombu_shares_queues(name: str, tmp_path: Path) -> None:
    """A plain Kombu program reads what kq publishes, and kq handles what it publishes, on every store."""
    import kq.backends

    broker = find(name, tmp_path)
    queue_id = broker.queue_id()
    seen = []
    with kq.App("test", broker=broker.url) as app, kombu.Connection(f"kq-{broker.url}") as connection:
        id = app.publish(queue_id, {"from": "kq"}, {"tenant": "t"})
        simple = connection.SimpleQueue(queue_id)
        message = simple.get(timeout=10)
        assert (message.payload, message.properties["message_id"]) == ({"from": "kq"}, id)
        assert message.headers["tenant"] == "t"
        message.ack()
        simple.put({"from": "kombu"}, headers={"tenant": "u"})
        simple.close()

        @app.consumer(queue_id)
        def handle(payload: object) -> None:
            seen.append((payload, queue.message().header("tenant")))

        assert app.drain(20) == 1
    broker.forget()

    assert seen == [({"from": "kombu"}, "u")]


def received(url: str, queue_id: str) -> set[str]:
    """What is in a queue, which is empty then."""
    seen = set()
    with kq.App("test", broker=url) as app, kq.Consumer(app, queue_id, prefetch=500) as consumer:
        while (message := consumer.receive(timeout=1.0)) is not None:
            seen.add(message.payload())
            message.ack()
    return seen


_FORKS_WHILE_OTHERS_PUBLISH = """
import os, sys, threading, traceback, kq

app = kq.App("test", broker=sys.argv[1])
queue, over = sys.argv[2], threading.Event()

def publish():
    while not over.is_set():
        app.publish(queue, "parent")

threads = [threading.Thread(target=publish) for _ in range(3)]
for thread in threads:
    thread.start()
codes = []
for n in range(10):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            app.publish_many(queue, [f"child {n}-{i}" for i in range(5)])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    codes.append(os.waitpid(pid, 0)[1])
over.set()
for thread in threads:
    thread.join()
app.close()
print(codes)
"""


@pytest.mark.parametrize("name", ["sqlite", "redis", "rabbitmq"])
def test_a_fork_may_come_in_the_middle_of_a_publish(name: str, tmp_path: Path) -> None:
    """Children that are forked while other threads publish, for the first time too, publish at once."""
    broker = find(name, tmp_path)
    queue_id = broker.queue_id()
    done = subprocess.run(
        [sys.executable, "-c", _FORKS_WHILE_OTHERS_PUBLISH, broker.url, queue_id],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    seen = received(broker.url, queue_id)
    broker.forget()

    assert done.stdout == f"{[0] * 10}\n", done.stderr
    assert seen == {"parent", *(f"child {n}-{i}" for n in range(10) for i in range(5))}


@pytest.mark.parametrize("name", ["sqlite", "redis", "rabbitmq"])
def test_several_are_the_first_to_publish_to_a_queue(name: str, tmp_path: Path) -> None:
    """RabbitMQ tells of a queue that another one declares before that takes messages: refuses them, for a moment."""
    broker = find(name, tmp_path)
    ids = [broker.queue_id(f"q{n}") for n in range(25)]
    with ExitStack() as stack:
        apps = [stack.enter_context(kq.App(f"test{n}", broker=broker.url)) for n in range(8)]
        for app in apps:
            app.publish(ids[0], "connected")
        pool = stack.enter_context(ThreadPoolExecutor(len(apps)))
        barrier = Barrier(len(apps))

        def publish(app: kq.App, n: int) -> None:
            for queue_id in ids[1:]:
                barrier.wait(60)
                # The one just a little after the other.
                until = monotonic() + n * 0.004
                while monotonic() < until:
                    pass
                app.publish(queue_id, n)

        for future in [pool.submit(publish, app, n) for n, app in enumerate(apps)]:
            future.result(60)
        counts = [apps[0].info(queue_id).ready for queue_id in ids]
    broker.forget()

    assert counts == [len(apps)] * len(ids)


def test_a_queue_that_others_limit_is_waited_for_once(rabbitmq: Broker) -> None:
    """Whoever does not know of the limit cannot tell that the queue is full; others would wait for it each time."""
    queue_id = rabbitmq.queue_id()
    with kq.App("owner", broker=rabbitmq.url) as owner, kq.App("other", broker=rabbitmq.url) as other:
        owner.queue(queue_id, max_length=1)
        owner.publish(queue_id, 1)
        refused = []
        for _ in range(3):
            error = None
            # A quorum queue takes a few more than it should.
            while error is None:
                began = monotonic()
                try:
                    other.publish(queue_id, 2)
                except kq.errors.Internal as raised:
                    error = raised
            assert error.details["reason"] == "full"
            refused.append(monotonic() - began)
    rabbitmq.forget()

    assert 1.5 < refused[0] < 5
    assert max(refused[1:]) < 1.5


_CLOSED_BY_A_SIGNAL = """
import asyncio, itertools, signal, sys, kq

app = kq.App("test", broker=sys.argv[1])
queue, closes, numbers = sys.argv[2], 100, itertools.count()

def close(*_):
    global closes
    closes -= 1
    app.close()
    if closes:
        signal.setitimer(signal.ITIMER_REAL, 0.002 + closes % 7 * 0.0003)

async def publish():
    while closes:
        text = f"{next(numbers)}"
        try:
            if sys.argv[3] == "many":
                texts = [f"{text}-{n}" for n in range(21)]
                await app.apublish_many(queue, texts)
                print(*texts, sep="\\n")
                continue
            await app.apublish(queue, text) if sys.argv[3] == "tasks" else app.publish(queue, text)
            print(text)
        except kq.errors.Error as error:
            assert error.retryable and error.details["reason"] == "unavailable", error

async def main():
    await asyncio.gather(*(publish() for _ in range(5)))

signal.signal(signal.SIGALRM, close)
app.publish(queue, "first")
signal.setitimer(signal.ITIMER_REAL, 0.002)
asyncio.run(main())
app.close()
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such signals")
@pytest.mark.parametrize("way", ["at once", "tasks", "many"])
@pytest.mark.parametrize("name", ["sqlite", "redis", "rabbitmq"])
def test_a_signals_handler_may_close_the_app(name: str, way: str, tmp_path: Path) -> None:
    """Wherever in a publish it comes, nothing waits for ever, and what was confirmed is there."""
    broker = find(name, tmp_path)
    queue_id = broker.queue_id()
    done = subprocess.run(
        [sys.executable, "-c", _CLOSED_BY_A_SIGNAL, broker.url, queue_id, way],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    seen = received(broker.url, queue_id)
    broker.forget()

    assert done.returncode == 0, done.stderr
    assert {"first", *done.stdout.split()} <= seen


@pytest.mark.parametrize("name", ["sqlite", "redis", "rabbitmq"])
def test_publishing_survives_a_fork(name: str, tmp_path: Path) -> None:
    """A process forked from a connected publisher opens a connection of its own; every message arrives."""
    broker = find(name, tmp_path)
    queue_id = broker.queue_id()
    with kq.App("test", broker=broker.url) as app:
        app.publish(queue_id, "parent before")
        children = []
        for n in range(4):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    app.publish_many(queue_id, [f"child {n}-{i}" for i in range(25)])
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        app.publish_many(queue_id, [f"parent {i}" for i in range(25)])
        codes = [os.waitpid(pid, 0)[1] for pid in children]
        count = app.info(queue_id).ready
    broker.forget()

    assert codes == [0] * 4
    assert count == 126
