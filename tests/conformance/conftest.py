"""What the contract's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic, time
from typing import Any
from uuid import uuid4

import pytest

from kq.backend import Backend, Delivery, Feed, Publication, QueueSpec
from kq.backends.rabbitmq_feed import RabbitFeed
from kq.backends.stored import StoredBackend
from kq.config import Settings
from kq.envelope import Envelope
from kq.queue_spec import default_spec
from kq.scheme import open_backend
from tests.broker import Broker, amqp_channel

#: Seconds of a lease in these tests.
LEASE = 1.0


#: For what only one kind of broker promises.
ON_RABBITMQ = pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True)
ON_REDIS = pytest.mark.parametrize("broker", ["redis"], indirect=True)
#: Where event loops send what their tasks publish.
ON_SENDERS = pytest.mark.parametrize("broker", ["redis", "rabbitmq"], indirect=True)
ON_SQLITE = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
ON_STORES = pytest.mark.parametrize("broker", ["memory", "sqlite", "redis", "fakeredis"], indirect=True)


class Bench:
    """A backend with a queue, and short words for what tests do to them."""

    def __init__(self, broker: Broker, lease: float = LEASE) -> None:
        self.broker = broker
        self.lease = lease
        self.backend: Backend = open_backend(Settings(broker=broker.url, lease=lease), "test")
        self.feeds: list[Feed] = []
        self.queue = self.declare()

    def declare(self, name: str = "q", **values: Any) -> QueueSpec:
        """Declare a queue of its own."""
        spec = default_spec(self.broker.queue_id(name))
        spec = QueueSpec(spec.id, **{"dead_letter": spec.dead_letter, **values})
        self.backend.declare(spec, create=True, exact=True)
        return spec

    @property
    def dead(self) -> QueueSpec:
        """The dead-letter queue of `queue`."""
        assert self.queue.dead_letter is not None
        return QueueSpec(self.queue.dead_letter)

    def message(
        self, id: str | None = None, *, queue: QueueSpec | None = None, delay: float = 0.0, priority: int = 4,
        headers: dict[str, Any] | None = None, body: bytes = b'{"n":1}',
    ) -> Publication:  # fmt: skip
        """Return a message as a producer makes it."""
        wire: dict[str, Any] = {"x_kq": 1, **(headers or {})}
        if delay:
            wire["x_due_at"] = time() + delay
        properties = {
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "delivery_mode": 2,
            "priority": priority,
            "timestamp": int(time()),
        }
        return Publication(queue or self.queue, Envelope(id or uuid4().hex, wire, properties, body), delay)

    def publish(self, *publications: Publication) -> None:
        """Publish, and insist on every confirm."""
        assert self.backend.publish(publications, 10.0) == [None] * len(publications)

    def feed(self, *queues: QueueSpec, prefetch: int = 100) -> Feed:
        """Open a feed; closed at the end."""
        feed = self.backend.feed(queues or [self.queue], prefetch)
        self.feeds.append(feed)
        return feed

    def take(self, feed: Feed, count: int, within: float = 15.0) -> list[Delivery]:
        """Fetch until ``count`` messages are there; fewer if time runs out."""
        found: list[Delivery] = []
        until = monotonic() + within
        renew_at = monotonic()
        while len(found) < count and monotonic() < until:
            if monotonic() >= renew_at:
                feed.renew()
                renew_at = monotonic() + self.lease / 3
            found += feed.fetch(count - len(found), {})
            if len(found) < count:
                feed.wait(max(0.0, min(until, renew_at) - monotonic()))
        return found

    def delete(self, queue_id: str) -> None:
        """Delete a queue behind the back of everybody who uses it."""
        if isinstance(self.backend, StoredBackend):
            self.backend._store().delete(queue_id)
        else:
            with amqp_channel() as channel:
                channel.queue_delete(queue_id)

    def abandon(self, feed: Feed) -> None:
        """Let a feed die as its process would: without a word."""
        if isinstance(feed, RabbitFeed):
            assert feed._link is not None
            feed._link.connection.collect()
        # A store's feed dies by not renewing its leases.


@pytest.fixture
def make_bench(broker: Broker) -> Iterator[Callable[..., Bench]]:
    """Makes benches, and clears them away."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        bench = Bench(broker, **options)
        made.append(bench)
        return bench

    yield make
    for bench in made:
        for feed in bench.feeds:
            feed.close()
        bench.backend.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """A backend and a queue on each broker in turn."""
    return make_bench()
