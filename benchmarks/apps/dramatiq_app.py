"""Dramatiq, with its defaults; on RabbitMQ with confirms, on quorum queues or on classic ones, its own choice."""

from __future__ import annotations

from typing import Any

import dramatiq

from benchmarks import work
from benchmarks.apps.publishing import Publisher, one_by_one

broker: Any
if work.URL.startswith("amqp"):
    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    class QuorumBroker(RabbitmqBroker):
        """Keeps messages as durably as the others' queues do."""

        def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
            return {**super()._build_queue_arguments(queue_name), "x-queue-type": "quorum"}

    kind = RabbitmqBroker if work.QUEUE_TYPE == "classic" else QuorumBroker
    broker = kind(url=work.URL, confirm_delivery=True)
else:
    from dramatiq.brokers.redis import RedisBroker

    broker = RedisBroker(url=work.URL)
dramatiq.set_broker(broker)

if work.STYLE == "async":
    from dramatiq.middleware.asyncio import AsyncIO

    broker.add_middleware(AsyncIO())

    @dramatiq.actor(queue_name=work.QUEUE, actor_name="handle", min_backoff=1)
    async def handle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        await work.arun(payload)

else:

    @dramatiq.actor(queue_name=work.QUEUE, actor_name="handle", min_backoff=1)
    def handle(payload: dict[str, Any]) -> None:
        """Handle a message."""
        work.run(payload, handle.send)


def publisher() -> Publisher:
    """Return how Dramatiq publishes."""
    return one_by_one(
        handle.send, lambda payload, delay: handle.send_with_options(args=(payload,), delay=int(delay * 1000))
    )
