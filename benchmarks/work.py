"""What every contender's handler does, and what the environment says of it.

====================  ===============================================================
``BENCH_URL``         the broker
``BENCH_QUEUE``       the queue, a name without a colon
``BENCH_TALLY``       the file of `benchmarks.tally`
``BENCH_WORK``        ``noop``, ``cpu`` (about a millisecond of it), ``sleep`` (10 ms), ``chain`` (publishes the
                      next message of its chain), or ``fail`` (fails the first time)
``BENCH_STYLE``       ``sync`` or ``async``: which kind of handler, where there is a choice
``BENCH_QUEUES``      over how many queues messages are spread
``BENCH_DECLARED``    how many queues are declared besides
``BENCH_HEADERS``     how many headers each message has
``BENCH_PRIORITIES``  over how many priorities messages are spread
``BENCH_QUEUE_TYPE``  on RabbitMQ, where there is a choice: ``quorum`` or ``classic``
====================  ===============================================================
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from benchmarks.tally import Tally

URL: Final = os.environ.get("BENCH_URL", "redis://127.0.0.1")
QUEUE: Final = os.environ.get("BENCH_QUEUE", "bench")
STYLE: Final = os.environ.get("BENCH_STYLE", "sync")
QUEUES: Final = int(os.environ.get("BENCH_QUEUES", "1"))
DECLARED: Final = int(os.environ.get("BENCH_DECLARED", "0"))
HEADERS: Final = int(os.environ.get("BENCH_HEADERS", "0"))
PRIORITIES: Final = int(os.environ.get("BENCH_PRIORITIES", "1"))
QUEUE_TYPE: Final = os.environ.get("BENCH_QUEUE_TYPE", "quorum")
WORK: Final = os.environ.get("BENCH_WORK", "noop")
#: Seconds of a handler that waits for something.
_SLEEP: Final = 0.01
#: Rounds of a hash: about a millisecond, with the interpreter's lock held.
_ROUNDS: Final = 1500

_tally = Tally(os.environ["BENCH_TALLY"]) if "BENCH_TALLY" in os.environ else None


def file_beside(url: str, name: str) -> str:
    """Return the path of somebody's file in the folder of a SQLite URL's: each has a schema of its own."""
    return f"{url.removeprefix('sqlite:///')}.{name}"


def names(queue: str, number: int) -> list[str]:
    """Return the names of the queues that messages are spread over."""
    return [queue] if number == 1 else [f"{queue}-{n}" for n in range(number)]


def _compute() -> None:
    digest = b""
    for _ in range(_ROUNDS):
        digest = hashlib.sha256(digest).digest()


def _next(payload: dict[str, Any]) -> dict[str, Any]:
    return {**payload, "chain": payload["chain"] - 1}


def _fail_once(payload: dict[str, Any]) -> None:
    if WORK == "fail" and _tally is not None and _tally.begin(payload["n"]):
        raise ConnectionError("fails the first time")


def run(payload: dict[str, Any], publish: Callable[[dict[str, Any]], object]) -> None:
    """Handle a message; ``publish`` is how another one is published."""
    _fail_once(payload)
    if _tally is not None:
        _tally.count(payload["at"])
    if WORK == "cpu":
        _compute()
    elif WORK == "sleep":
        time.sleep(_SLEEP)
    elif WORK == "chain" and payload["chain"]:
        publish(_next(payload))


async def arun(payload: dict[str, Any], publish: Callable[[dict[str, Any]], Awaitable[object]] | None = None) -> None:
    """Handle a message on an event loop; ``publish`` is how another one is published, if it can be awaited."""
    _fail_once(payload)
    if _tally is not None:
        _tally.count(payload["at"])
    if WORK == "cpu":
        _compute()
    elif WORK == "sleep":
        # Imported where it is needed: those whose handlers are sync, and who do without, are not to pay for it.
        import asyncio

        await asyncio.sleep(_SLEEP)
    elif WORK == "chain" and payload["chain"]:
        assert publish is not None, "this contender has no way to publish on an event loop"
        await publish(_next(payload))
