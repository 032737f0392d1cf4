"""taskiq: a Redis stream, of taskiq-redis' brokers the one that acknowledges; on RabbitMQ quorum queues."""

from __future__ import annotations

import asyncio
from typing import Any

from taskiq import SimpleRetryMiddleware

from benchmarks import work
from benchmarks.apps.publishing import Publisher, concurrently

broker: Any
if work.URL.startswith("amqp"):
    from taskiq_aio_pika import AioPikaBroker, Queue, QueueType

    broker = AioPikaBroker(
        url=work.URL, qos=200, task_queues=[Queue(name=work.QUEUE, type=QueueType.QUORUM, routing_key=work.QUEUE)]
    )
else:
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(url=work.URL, queue_name=work.QUEUE, consumer_id="0")

broker = broker.with_middlewares(SimpleRetryMiddleware(default_retry_label=True))

if work.STYLE == "sync":

    @broker.task(task_name="handle")
    def handle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        work.run(payload, handle.kiq)

else:

    @broker.task(task_name="handle")
    async def handle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        await work.arun(payload, handle.kiq)


def publisher() -> Publisher:
    """Return how taskiq publishes."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(broker.startup())
    return concurrently(loop, handle.kiq)
