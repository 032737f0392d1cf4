"""kq, with its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kq
from benchmarks import work
from benchmarks.apps.publishing import Publisher, from_tasks

app = kq.App("bench", broker=work.URL)
QUEUES = [f"bench:{name}" for name in work.names(work.QUEUE, work.QUEUES)]
for _name in work.names(f"{work.QUEUE}-more", work.DECLARED):
    app.queue(f"bench:{_name}")
_HEADERS = {f"header-{n}": "x" * 20 for n in range(work.HEADERS)}
_RETRY = kq.Backoff(initial=0.0, max=0.0)
_PRIORITIES = ("normal", "high", "low")[: work.PRIORITIES]


def publish(payload: dict[str, Any]) -> str:
    """Publish a message."""
    return app.publish(QUEUES[0], payload)


async def apublish(payload: dict[str, Any]) -> str:
    """Publish a message on an event loop."""
    return await app.apublish(QUEUES[0], payload)


for _queue in QUEUES:
    if work.PRIORITIES > 1 and work.URL.startswith("amqp"):
        app.queue(_queue, max_priority=9)
    elif work.QUEUE_TYPE == "classic":
        app.queue(_queue, options={"amqp": {"queue_type": "classic"}})
    if work.STYLE == "async":

        @app.consumer(_queue, retry=_RETRY)
        async def ahandle(payload: dict[str, Any]) -> None:
            """Handle a message."""
            await work.arun(payload, apublish)

    else:

        @app.consumer(_queue, retry=_RETRY)
        def handle(payload: dict[str, Any]) -> None:
            """Handle a message."""
            work.run(payload, publish)


def publisher() -> Publisher:
    """Return how kq publishes."""
    turn = 0

    def many(payloads: Sequence[dict[str, Any]]) -> None:
        nonlocal turn
        places = [(queue, priority) for queue in QUEUES for priority in _PRIORITIES]
        # Where there are many, each gets its messages in one call for every so many of them.
        share = max(1, len(payloads) // len(places))
        for start in range(0, len(payloads), share):
            queue, priority = places[turn % len(places)]
            headers = _HEADERS if priority == "normal" else {**_HEADERS, "priority": priority}
            app.publish_many(queue, payloads[start : start + share], headers or None)
            turn += 1

    def later(payloads: Sequence[dict[str, Any]], delay: float) -> None:
        app.publish_many(QUEUES[0], payloads, delay=delay)

    def tasks(payloads: Sequence[dict[str, Any]], number: int) -> None:
        # Only here: who publishes otherwise is not to pay for it.
        import asyncio

        asyncio.run(from_tasks(apublish, payloads, number))

    return Publisher(publish, many, later, tasks)
