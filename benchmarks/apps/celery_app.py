"""Celery: acknowledges late, and fetches far ahead, as its guide on optimizing says for short tasks.

See https://docs.celeryq.dev/en/stable/userguide/optimizing.html.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from benchmarks import work
from benchmarks.apps.publishing import Publisher, one_by_one

app = Celery("bench", broker=work.URL)
app.conf.update(
    task_default_queue=work.QUEUE,
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=64,
    broker_connection_retry_on_startup=True,
)
if work.URL.startswith("amqp"):
    app.conf.update(
        broker_transport_options={"confirm_publish": True},
        task_default_queue_type="quorum",
        worker_detect_quorum_queues=True,
    )


@app.task(name="handle", autoretry_for=(ConnectionError,), default_retry_delay=0)
def handle(payload: dict[str, Any]) -> None:
    """Handle a message."""
    work.run(payload, handle.delay)


def publisher() -> Publisher:
    """Return how Celery publishes."""
    return one_by_one(handle.delay, lambda payload, delay: handle.apply_async((payload,), countdown=delay))
