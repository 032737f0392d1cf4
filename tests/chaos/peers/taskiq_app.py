"""The handler as a taskiq task on a Redis stream: of taskiq-redis' brokers, the one that acknowledges what ran.

See https://github.com/taskiq-python/taskiq-redis.
"""

from __future__ import annotations

import os
import time
from typing import Any

from taskiq_redis import RedisStreamBroker

from tests.chaos.history import Writer

broker = RedisStreamBroker(
    url=os.environ["KQ_TEST_CHAOS_URL"],
    queue_name=os.environ["KQ_TEST_CHAOS_QUEUE"],
    # Milliseconds; ten minutes by default: no run would end.
    idle_timeout=4_000,
    # Seconds; for workers that are killed, as its description says.
    unacknowledged_lock_timeout=4.0,
)
history = Writer(os.environ["KQ_TEST_CHAOS_HISTORY"])


@broker.task(task_name="handle")
def handle(payload: dict[str, Any]) -> None:
    """Note the start, take a while, note the end."""
    history.write("started", payload["id"])
    time.sleep(payload["ms"] / 1000)
    history.write("done", payload["id"])
