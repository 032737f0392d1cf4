"""The brokers that tests run against: found, started inside the process, or loudly missing."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import amqp
import pytest
import redis

REDIS_URL = os.environ.get("KQ_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
AMQP_URL = os.environ.get("KQ_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672")
#: Brokers whose absence is a failure, by name.
REQUIRED = frozenset(filter(None, os.environ.get("KQ_TEST_REQUIRE", "").split(",")))

#: Every broker, and those that are shared between processes.
ALL = ("memory", "sqlite", "redis", "fakeredis", "rabbitmq")
SHARED = ("sqlite", "redis", "rabbitmq")


@dataclass
class Broker:
    """A broker to test on.

    Attributes:
        name: One of `ALL`.
        url: Where it is.
        used: The queue ids that this test has named.
    """

    name: str
    url: str
    used: list[str] = field(default_factory=list)

    def queue_id(self, name: str = "q") -> str:
        """Return the id of a queue that nobody else uses."""
        queue_id = f"test{uuid4().hex[:12]}:{name}"
        self.used.append(queue_id)
        return queue_id

    @property
    def stores(self) -> bool:
        """Whether it is one of kq's own stores."""
        return self.name != "rabbitmq"

    def put_raw(self, queue_id: str, raw: bytes) -> None:
        """Put bytes that are no envelope on a queue, as a stranger could."""
        if self.name in ("redis", "fakeredis"):
            with closing(redis.Redis.from_url(self.url)) as client:
                client.rpush(f"{{kq:{queue_id}}}:r:4", raw)
                client.rpush(f"{{kq:{queue_id}}}:w", "1")
        elif self.name == "rabbitmq":
            with amqp_channel() as channel:
                message = amqp.Message(raw, content_type="application/octet-stream")
                channel.basic_publish(message, routing_key=queue_id)
        else:
            from kq.backend import BackendOptions
            from kq.backends.store import Entry
            from kq.backends.store_url import open_store

            store = open_store(self.url, BackendOptions(30, 30, 10, "test"))
            store.put(queue_id, [Entry(uuid4().hex, raw, 4)], None)
            store.close()

    def forget(self) -> None:
        """Delete what this test has made."""
        if self.name == "redis":
            with closing(redis.Redis.from_url(self.url)) as client:
                for queue_id in self.used:
                    keys = list(client.scan_iter(f"{{kq:{queue_id}*", count=10_000))
                    if keys:
                        client.unlink(*keys)
        elif self.name == "rabbitmq":
            for queue_id in self.used:
                for name in (queue_id, queue_id + ".dead"):
                    with amqp_channel() as channel:
                        channel.queue_delete(name)
                        channel.exchange_delete(name)


@contextmanager
def amqp_channel() -> Iterator[Any]:
    """Yield a channel of a client that is not ours."""
    parts = urlsplit(AMQP_URL)
    connection = amqp.Connection(
        host=f"{parts.hostname}:{parts.port or 5672}",
        userid=parts.username or "guest",
        password=parts.password or "guest",
        virtual_host=parts.path.lstrip("/") or "/",
    )
    connection.connect()
    try:
        channel = connection.channel()
        channel.auto_decode = False
        yield channel
    finally:
        connection.close()


class _PatientWriter:
    """Writes all of a large reply: fakeredis' sockets do not block, and its own writer gives up when one is full."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        """Send everything, waiting while the reader is slow."""
        left = memoryview(data)
        while left:
            try:
                left = left[self._connection.send(left) :]
            except BlockingIOError:
                select.select([], [self._connection], [])

    def flush(self) -> None:
        """Do nothing: nothing is held back."""


@cache
def _fake_redis() -> str:
    """Start fakeredis' TCP server once, in this process, and return its URL."""
    from fakeredis import TcpFakeServer
    from fakeredis._clients._tcp_server import TCPFakeRequestHandler

    class Handler(TCPFakeRequestHandler):  # type: ignore[misc,unused-ignore]
        def setup(self) -> None:
            super().setup()
            self.writer.writer = _PatientWriter(self.connection)

    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis", server_version=(7, 0))
    server.RequestHandlerClass = Handler
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="fakeredis", daemon=True).start()
    return f"redis://127.0.0.1:{server.server_address[1]}/0"


@cache
def _answers(url: str, port: int) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or port), timeout=2):
            return True
    except OSError:
        return False


def find(name: str, folder: Path) -> Broker:
    """Return a broker by name; skip the test where it is missing, or fail where it must not be."""
    if name == "memory":
        return Broker(name, f"memory://{uuid4().hex}")
    if name == "sqlite":
        return Broker(name, f"sqlite:///{folder / 'kq.db'}")
    if name == "fakeredis":
        return Broker(name, _fake_redis())
    url, port = (REDIS_URL, 6379) if name == "redis" else (AMQP_URL, 5672)
    if not _answers(url, port):
        text = f"no {name} answers at {url.rpartition('@')[2]}"
        if name in REQUIRED:
            pytest.fail(f"{text}, and it is required")
        pytest.skip(f"{text}: NOT TESTED on {name}")
    return Broker(name, url)
