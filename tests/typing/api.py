"""How a typed program uses kq. Never run: mypy checks it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import kq
from kq import errors, queue

app: kq.App = kq.App("typed", broker="memory://", lease=30.0)
app.queue("typed:q", retry=kq.Backoff(initial=1.0, jitter=0.2), max_length=10)
other: kq.App = kq.App(
    "typed", drivers={"events": "redis://localhost", "orders": kq.Driver("amqps://host", tls=kq.Tls(ca="ca.pem"))}
)
other.queue("typed:events", driver="events")


@app.consumer("typed:q", timeout=timedelta(seconds=5), max_attempts=3)
def handle(payload: dict[str, Any]) -> bool:
    """A decorated function keeps its type."""
    message: kq.Message = queue.message()
    attempt: int = message.attempt()
    if attempt > 2:
        raise kq.Retry(delay=5, count=False)
    raise errors.Invalid("no", details={"id": message.id()})


plain: bool = handle({"a": 1})


async def main() -> list[str]:
    """Publishing returns ids."""
    one: str = queue.publish("typed:q", {"a": 1}, {"priority": "high"}, delay=1.5)
    two: str = await app.apublish("typed:q", [1], at=datetime.now(timezone.utc))
    many: list[str] = app.publish_many("typed:q", ({"n": n} for n in range(3)), expires=timedelta(hours=1))
    info: kq.QueueInfo = app.info("typed:q")
    ready: int = info.ready
    letters: list[kq.DeadLetter] = app.dead("typed:q").list(limit=ready)
    handled: int = app.drain(timeout=1)
    with kq.Consumer(app, ["typed:q"]) as consumer:
        received = consumer.receive(timeout=1.0)
        if received is not None:
            received.ack()
    return [one, two, *many, *(letter.id for letter in letters), str(handled)]
