"""The handler as a Dramatiq actor, with the defaults of ``RedisBroker``: it acknowledges what ran.

See https://dramatiq.io/reference.html#dramatiq.brokers.redis.RedisBroker.
"""

from __future__ import annotations

import os
import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from tests.chaos.history import Writer

# A minute by default: no run would end.
dramatiq.set_broker(RedisBroker(url=os.environ["KQ_TEST_CHAOS_URL"], heartbeat_timeout=5_000))
history = Writer(os.environ["KQ_TEST_CHAOS_HISTORY"])


@dramatiq.actor(queue_name=os.environ["KQ_TEST_CHAOS_QUEUE"])
def handle(payload: dict[str, Any]) -> None:
    """Note the start, take a while, note the end."""
    history.write("started", payload["id"])
    time.sleep(payload["ms"] / 1000)
    history.write("done", payload["id"])
