"""A publishing process: ``python -m benchmarks.publish MODULE``, with an `Order` as JSON on its standard input.

Prints one line of JSON when it is connected and has published nothing but a warm-up, waits for a line, does what is
ordered, and prints another: ``seconds``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Final

from benchmarks.apps.publishing import THREADS, TOGETHER, Publisher

#: Messages of one call of `Publisher.many`.
LOT: Final = 1000


@dataclass(frozen=True)
class Order:
    """What is to be published.

    Attributes:
        messages: How many.
        way: ``one``, one at a time; ``many``; or from several ``threads`` or ``tasks``, or from a single ``task``,
            each one at a time.
        pad: Bytes of each message's text.
        rate: Messages a second; 0 for as fast as possible. Those with a rate say when they were published.
        warm: Messages before the clock runs; they are left in the queue.
        chain: With a way of ``many``: how many messages each is the first of, beside itself.
        numbered: With a way of ``many``: whether each has a number.
        delay: Seconds after which they are to run. With a way of ``many`` they say when they were published.
    """

    messages: int
    way: str = "one"
    pad: int = 100
    rate: float = 0.0
    warm: int = 0
    chain: int = 0
    numbered: bool = False
    delay: float = 0.0

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))


def carry_out(order: Order, publisher: Publisher) -> None:
    """Publish what is ordered."""
    pad = "x" * order.pad
    if order.way == "many":
        for start in range(0, order.messages, LOT):
            at = time.monotonic() if order.delay else 0.0
            more = {"chain": order.chain} if order.chain else {}
            numbers = range(start, min(start + LOT, order.messages))
            payloads = [{"at": at, "pad": pad, **more, **({"n": n} if order.numbered else {})} for n in numbers]
            if order.delay:
                assert publisher.later is not None, "this contender has no delays"
                publisher.later(payloads, order.delay)
            else:
                publisher.many(payloads)
        return
    if order.way != "one":
        payloads = [{"at": 0.0, "pad": pad}] * order.messages
        if order.way == "threads":
            publisher.threads(payloads, THREADS)
        else:
            assert publisher.tasks is not None, "this contender knows no event loops"
            publisher.tasks(payloads, TOGETHER if order.way == "tasks" else 1)
        return
    began = time.monotonic()
    for n in range(order.messages):
        if order.rate:
            time.sleep(max(0.0, began + n / order.rate - time.monotonic()))
        publisher.one({"at": time.monotonic() if order.rate else 0.0, "pad": pad})


def _say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the program."""
    order = Order(**json.loads(sys.stdin.readline()))
    publisher: Publisher = import_module("benchmarks.apps." + sys.argv[1]).publisher()
    for _ in range(order.warm):
        publisher.one({"at": 0.0, "pad": ""})
    _say(ready=True)
    sys.stdin.readline()
    began = time.perf_counter()
    carry_out(order, publisher)
    _say(seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
