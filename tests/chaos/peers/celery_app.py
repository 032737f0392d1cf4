"""The handler as a Celery task.

Its tasks are acknowledged after they ran, also when their process is lost, and not fetched ahead; see
https://docs.celeryq.dev/en/stable/userguide/configuration.html and
https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/redis.html.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery

from tests.chaos.history import Writer

app = Celery("chaos", broker=os.environ["KQ_TEST_CHAOS_URL"])
app.conf.update(
    task_default_queue=os.environ["KQ_TEST_CHAOS_QUEUE"],
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    # An hour by default: no run would end.
    broker_transport_options={"visibility_timeout": 4},
)
history = Writer(os.environ["KQ_TEST_CHAOS_HISTORY"])


@app.task(name="handle")
def handle(payload: dict[str, Any]) -> None:
    """Note the start, take a while, note the end."""
    history.write("started", payload["id"])
    time.sleep(payload["ms"] / 1000)
    history.write("done", payload["id"])
