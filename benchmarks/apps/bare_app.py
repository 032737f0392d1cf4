"""A bare client that publishes as many bytes and does nothing else: redis-py, or py-amqp on a quorum queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import work
from benchmarks.apps.publishing import Publisher
from benchmarks.bare import LOT, Confirmed, body

Payload = dict[str, Any]


def publisher() -> Publisher:
    """Return how it publishes."""
    return _on_redis() if work.URL.startswith("redis") else _on_rabbitmq()


def _on_redis() -> Publisher:
    import redis

    client = redis.Redis.from_url(work.URL)

    def one(payload: Payload) -> None:
        client.lpush(work.QUEUE, body(payload))

    def many(payloads: Sequence[Payload]) -> None:
        for start in range(0, len(payloads), LOT):
            with client.pipeline(transaction=False) as pipeline:
                for payload in payloads[start : start + LOT]:
                    pipeline.lpush(work.QUEUE, body(payload))
                pipeline.execute()

    return Publisher(one, many)


def _on_rabbitmq() -> Publisher:
    confirmed = Confirmed(work.URL, work.QUEUE)

    def many(payloads: Sequence[Payload]) -> None:
        for start in range(0, len(payloads), LOT):
            confirmed.publish([body(payload) for payload in payloads[start : start + LOT]])

    return Publisher(lambda payload: confirmed.publish([body(payload)]), many)
