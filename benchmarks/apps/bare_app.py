"""A bare client that publishes as many bytes and does nothing else: redis-py, py-amqp on a quorum queue, or sqlite3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import work
from benchmarks.apps.publishing import Publisher
from benchmarks.bare import LOT, Confirmed, Inserted, body

Payload = dict[str, Any]


def publisher() -> Publisher:
    """Return how it publishes."""
    if work.URL.startswith("redis"):
        return _on_redis()
    return _in_lots(Confirmed(work.URL, work.QUEUE) if work.URL.startswith("amqp") else Inserted(work.URL, work.QUEUE))


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


def _in_lots(client: Confirmed | Inserted) -> Publisher:
    def many(payloads: Sequence[Payload]) -> None:
        for start in range(0, len(payloads), LOT):
            client.publish([body(payload) for payload in payloads[start : start + LOT]])

    return Publisher(lambda payload: client.publish([body(payload)]), many)
