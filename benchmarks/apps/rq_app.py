"""RQ, with workers that do not fork for each job, and no results kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from rq import Queue

from benchmarks import work
from benchmarks.apps.publishing import Publisher


def handle(payload: dict[str, Any]) -> None:
    """Handle a message."""
    work.run(payload)


def publisher() -> Publisher:
    """Return how RQ publishes."""
    queue = Queue(work.QUEUE, connection=Redis.from_url(work.URL))
    path = "benchmarks.apps.rq_app.handle"

    def many(payloads: Sequence[dict[str, Any]]) -> None:
        queue.enqueue_many([Queue.prepare_data(path, (payload,), result_ttl=0) for payload in payloads])

    return Publisher(lambda payload: queue.enqueue(path, payload, result_ttl=0), many)
