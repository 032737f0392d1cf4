"""FastStream: a consumer group on a Redis stream; on RabbitMQ a quorum queue."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from faststream import FastStream

from benchmarks import work
from benchmarks.apps.publishing import Publisher, concurrently

broker: Any
where: dict[str, Any]
if work.URL.startswith("amqp"):
    from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

    broker = RabbitBroker(work.URL, default_channel=Channel(prefetch_count=200), logger=None, apply_types=False)
    queue = RabbitQueue(work.QUEUE, queue_type=QueueType.QUORUM, durable=True)
    subscriber = broker.subscriber(queue)
    where = {"queue": work.QUEUE}
else:
    from faststream.redis import RedisBroker, StreamSub

    broker = RedisBroker(work.URL, logger=None, apply_types=False)
    stream = StreamSub(work.QUEUE, group="bench", consumer=f"bench-{os.getpid()}", max_records=100, last_id="0")
    subscriber = broker.subscriber(stream=stream)
    where = {"stream": work.QUEUE}
app = FastStream(broker, logger=None)


if work.STYLE == "sync":

    @subscriber
    def handle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        work.run(payload)

else:

    @subscriber
    async def ahandle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        await work.arun(payload)


def publisher() -> Publisher:
    """Return how FastStream publishes."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(broker.connect())
    if work.URL.startswith("amqp"):
        loop.run_until_complete(broker.declare_queue(queue))
    return concurrently(loop, lambda payload: broker.publish(payload, **where))
