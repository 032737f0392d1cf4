"""FastStream: a consumer group on a Redis stream; on RabbitMQ a quorum queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import Any

import anyio.to_thread
from faststream import FastStream

from benchmarks import work
from benchmarks.apps.publishing import Publisher, concurrently
from benchmarks.contender import TASKS, THREADS

broker: Any
where: dict[str, Any]
if work.URL.startswith("amqp"):
    from faststream import AckPolicy
    from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

    broker = RabbitBroker(work.URL, default_channel=Channel(prefetch_count=200), logger=None, apply_types=False)
    queue = RabbitQueue(work.QUEUE, queue_type=QueueType.QUORUM, durable=True)
    subscriber = broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)
    where = {"queue": work.QUEUE}
else:
    from faststream.redis import RedisBroker, StreamSub

    broker = RedisBroker(work.URL, logger=None, apply_types=False)
    stream = StreamSub(work.QUEUE, group="bench", consumer=f"bench-{os.getpid()}", max_records=100, last_id="0")
    # One message after the other costs the least; where handlers wait it would be all that is measured.
    together = {"sync": THREADS, "async": TASKS}[work.STYLE] if work.WORK == "sleep" else None
    subscriber = broker.subscriber(stream=stream, max_workers=together)
    where = {"stream": work.QUEUE}
app = FastStream(broker, logger=None)


def publish(payload: dict[str, Any]) -> Awaitable[object]:
    """Publish a message."""
    published: Awaitable[object] = broker.publish(payload, **where)
    return published


@app.on_startup
async def limit_threads() -> None:
    """Run as many sync handlers at once as the others do; forty are the default."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS


if work.STYLE == "sync":

    @subscriber
    def handle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        work.run(payload, publish)

else:

    @subscriber
    async def ahandle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        await work.arun(payload, publish)


def publisher() -> Publisher:
    """Return how FastStream publishes."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(broker.connect())
    if work.URL.startswith("amqp"):
        loop.run_until_complete(broker.declare_queue(queue))
    return concurrently(loop, publish)
