"""huey on Redis, without results."""

from __future__ import annotations

from typing import Any

from huey import RedisHuey

from benchmarks import work
from benchmarks.apps.publishing import Publisher, one_by_one

huey = RedisHuey(work.QUEUE, url=work.URL, results=False)


@huey.task(name="handle")
def handle(payload: dict[str, Any]) -> None:
    """Handle a message."""
    work.run(payload)


def publisher() -> Publisher:
    """Return how huey publishes."""
    return one_by_one(handle, lambda payload, delay: handle.schedule((payload,), delay=delay))
