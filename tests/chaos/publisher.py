"""A publishing process: ``python -m tests.chaos.publisher JSON``. It notes what it tries and what it is told.

The argument holds the fields of `Order`.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import asdict, dataclass, field
from time import monotonic, sleep
from typing import Any

import kq
from kq import errors
from tests.chaos.history import Writer

#: Seconds of the first and of the longest wait between two tries of one message.
_AGAIN = (0.1, 2.0)


@dataclass
class Order:
    """What to publish.

    Attributes:
        url: The broker.
        queue: The queue.
        history: The folder of the history.
        prefix: What ids start with.
        messages: How many.
        rate: Messages a second; 0 for as fast as possible.
        tries: How often a message is tried, under the same id.
        many: Messages for each ``publish_many``; 0 for single publishes.
        ms: Milliseconds that its handler takes.
        pad: Bytes to carry beside.
        plan: What happens to each message, attempt by attempt; see `tests.chaos.app`.
        delay: Seconds of delay: the least and the most, evenly spread.
        timeout: Seconds for one publish.
        declare: Arguments of the queue.
    """

    url: str
    queue: str
    history: str
    prefix: str = "m"
    messages: int = 1000
    rate: float = 500.0
    tries: int = 5
    many: int = 0
    ms: float = 5.0
    pad: int = 200
    plan: list[str] = field(default_factory=list)
    delay: list[float] = field(default_factory=list)
    timeout: float = 10.0
    declare: dict[str, Any] = field(default_factory=dict)

    def payload(self, id: str) -> dict[str, Any]:
        """Return the payload of one message."""
        pad = (id * (1 + self.pad // len(id)))[: self.pad]
        return {"id": id, "ms": self.ms, "plan": self.plan, "pad": pad, "crc": zlib.crc32(pad.encode())}

    def text(self) -> str:
        """Return the program's argument."""
        return json.dumps(asdict(self))


def publish(app: kq.App, order: Order, history: Writer) -> None:
    """Carry an order out."""
    began = monotonic()
    step = order.many or 1
    for first in range(0, order.messages, step):
        if order.rate:
            sleep(max(0.0, began + first / order.rate - monotonic()))
        ids = [f"{order.prefix}-{n}" for n in range(first, min(first + step, order.messages))]
        for id in ids:
            history.write("attempted", id)
        if order.many:
            try:
                app.publish_many(order.queue, [order.payload(id) for id in ids])
            except errors.Error as error:
                # The ids of those that are stored are not ours: none of them counts as confirmed.
                _note(history, "rejected", ids, 1, error)
            else:
                _note(history, "acked", ids, 1, None)
        else:
            _publish_one(app, order, history, ids[0], first)


def _publish_one(app: kq.App, order: Order, history: Writer, id: str, n: int) -> None:
    delay = None
    if order.delay:
        least, most = order.delay
        delay = least + (most - least) * n / max(1, order.messages - 1)
    wait, longest = _AGAIN
    for attempt in range(1, order.tries + 1):
        began = monotonic()
        try:
            app.publish(order.queue, order.payload(id), message_id=id, delay=delay)
        except errors.Error as error:
            _note(history, "rejected", [id], attempt, error, monotonic() - began)
            if not error.retryable:
                return
            if attempt < order.tries:
                sleep(wait)
                wait = min(2 * wait, longest)
        else:
            history.write("acked", id, attempt)
            return


def _note(
    history: Writer, event: str, ids: list[str], attempt: int, error: errors.Error | None, took: float = 0.0
) -> None:
    text = "" if error is None else f"{error.details.get('reason')} {took:.3f} {error.kind} {error.message[:200]}"
    for id in ids:
        history.write(event, id, attempt, text)


def main(argument: str) -> None:
    """Run the program."""
    order = Order(**json.loads(argument))
    with kq.App("chaos-publisher", broker=order.url, publish_timeout=order.timeout) as app:
        if order.declare:
            app.queue(order.queue, **order.declare)
        publish(app, order, Writer(order.history))


if __name__ == "__main__":
    main(sys.argv[1])
