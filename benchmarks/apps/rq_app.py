"""RQ, with workers that do not fork for each job, and no results kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis import Redis
from rq import Queue, Retry

from benchmarks import work
from benchmarks.apps.publishing import Publisher

queue = Queue(work.QUEUE, connection=Redis.from_url(work.URL))
_RETRY = Retry(max=1)
_PATH = "benchmarks.apps.rq_app.handle"


def publish(payload: dict[str, Any]) -> object:
    """Publish a message."""
    return queue.enqueue(_PATH, payload, result_ttl=0, retry=_RETRY)


def handle(payload: dict[str, Any]) -> None:
    """Handle a message."""
    work.run(payload, publish)


def publisher() -> Publisher:
    """Return how RQ publishes."""

    def many(payloads: Sequence[dict[str, Any]]) -> None:
        queue.enqueue_many([Queue.prepare_data(_PATH, (payload,), result_ttl=0, retry=_RETRY) for payload in payloads])

    return Publisher(publish, many)
