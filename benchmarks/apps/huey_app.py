"""huey on Redis or SQLite, without results."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import work
from benchmarks.apps.publishing import Publisher, one_by_one

if work.URL.startswith("redis"):
    from huey import RedisHuey

    huey = RedisHuey(work.QUEUE, url=work.URL, results=False)
else:
    # It loads redis-py wherever that is installed. Who uses SQLite need not have it.
    sys.modules.setdefault("redis", None)  # type: ignore[arg-type]

    from huey import SqliteHuey

    # As durable as kq, and as SQLite by itself.
    huey = SqliteHuey(work.QUEUE, filename=work.file_beside(work.URL, "huey"), results=False, fsync=True)


@huey.task(name="handle", retries=1)
def handle(payload: dict[str, Any]) -> None:
    """Handle a message."""
    work.run(payload, handle)


def publisher() -> Publisher:
    """Return how huey publishes."""
    return one_by_one(handle, lambda payload, delay: handle.schedule((payload,), delay=delay))
