"""A publishing process: ``python -m tests.chaos.peers.publish PEER MESSAGES RATE PREFIX PAD``.

Each message is published once, as the peer's documentation shows it, with whatever retries the peer makes by itself.
RATE is in messages a second, 0 for as fast as possible; PAD is in bytes. Three more things may be in the environment:
``KQ_TEST_CHAOS_GATE``, a named pipe that somebody has to open before anything is published,
``KQ_TEST_CHAOS_REFUSALS``, the number of refusals in a row after which it ends, and ``KQ_TEST_CHAOS_SECONDS``, after
which it ends as well.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

from tests.chaos.history import Writer
from tests.chaos.publisher import Order

#: Seconds that one publish may take.
_LIMIT = 10.0
#: What is printed when the peer is loaded and connected.
READY = "ready to publish"

Publish = Callable[[dict[str, Any]], object]


@contextmanager
def _limited() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError(f"not published within {_LIMIT:g} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, _LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _kq() -> Publish:
    import kq

    app = kq.App("chaos-publisher", broker=os.environ["KQ_TEST_CHAOS_URL"], publish_timeout=_LIMIT)
    queue = os.environ["KQ_TEST_CHAOS_QUEUE"]
    app.queue(queue)
    return lambda payload: app.publish(queue, payload, message_id=payload["id"])


def _celery() -> Publish:
    from tests.chaos.peers.celery_app import handle

    publish: Publish = handle.delay
    return publish


def _dramatiq() -> Publish:
    from tests.chaos.peers.dramatiq_app import handle

    publish: Publish = handle.send
    return publish


def _taskiq() -> Publish:
    from tests.chaos.peers.taskiq_app import broker, handle

    loop = asyncio.new_event_loop()
    # It makes the consumer group, without which a message would be there and never be read.
    loop.run_until_complete(broker.startup())
    return lambda payload: loop.run_until_complete(handle.kiq(payload))


PUBLISHERS: dict[str, Callable[[], Publish]] = {
    "kq": _kq, "celery": _celery, "dramatiq": _dramatiq, "taskiq": _taskiq,
}  # fmt: skip


def run(publish: Publish, order: Order, history: Writer, refusals: int = 0, seconds: float = 0.0) -> None:
    """Publish what is ordered; end early after so many refusals in a row, or seconds, unless that is 0."""
    began = monotonic()
    refused = 0
    for n in range(order.messages):
        if seconds and monotonic() > began + seconds:
            return
        if order.rate:
            sleep(max(0.0, began + n / order.rate - monotonic()))
        id = f"{order.prefix}-{n}"
        history.write("attempted", id)
        try:
            with _limited():
                publish(order.payload(id))
        except Exception as error:
            history.write("rejected", id, 1, f"{type(error).__name__} {str(error)[:200]}")
            refused += 1
            if refused == refusals:
                return
        else:
            history.write("acked", id)
            refused = 0


def main(peer: str, messages: str, rate: str, prefix: str, pad: str) -> None:
    """Run the program."""
    environment = os.environ
    folder = environment["KQ_TEST_CHAOS_HISTORY"]
    order = Order(
        environment["KQ_TEST_CHAOS_URL"], environment["KQ_TEST_CHAOS_QUEUE"], folder,
        prefix=prefix, messages=int(messages), rate=float(rate), pad=int(pad),
    )  # fmt: skip
    publish = PUBLISHERS[peer]()
    sys.stdout.write(READY + "\n")
    sys.stdout.flush()
    if gate := environment.get("KQ_TEST_CHAOS_GATE"):
        os.close(os.open(gate, os.O_RDONLY))
    refusals, seconds = environment.get("KQ_TEST_CHAOS_REFUSALS", "0"), environment.get("KQ_TEST_CHAOS_SECONDS", "0")
    run(publish, order, Writer(folder), int(refusals), float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
