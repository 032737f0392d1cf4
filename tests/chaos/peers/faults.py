"""The three faults that every peer is put through, with the same load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Final

from tests.chaos.peers.stage import Stage, kill

#: The load: messages, messages a second, bytes beside each.
_MESSAGES: Final = 2000
_RATE: Final = 300.0
_PAD: Final = 200
#: Bytes with which Redis is filled, so that it takes seconds and not minutes.
_FAT: Final = 3000
_KILLS: Final = 8
#: Seconds that a worker may take until it has begun a message.
_AT_WORK: Final = 8.0


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: By which people ask for it.
        play: What happens.
        redis: What Redis is started with.
    """

    name: str
    play: Callable[[Stage], None]
    redis: tuple[str, ...] = ()


def consumers_killed(stage: Stage) -> None:
    """Kill the worker, main process and children, soon after it began to work, again and again under load."""
    worker = stage.worker()
    load = stage.load("kill", messages=_MESSAGES, rate=_RATE, pad=_PAD)
    idle = 0
    begun = 0
    for _ in range(_KILLS):
        idle += not stage.until_count("started", begun + 1, _AT_WORK)
        stage.pause(0.5, 1.2)
        kill(worker)
        begun = stage.history.count("started")
        worker = stage.worker()
    stage.figures["idle_kills"] = idle
    stage.finish(load)
    stage.rest()


def half_open(stage: Stage) -> None:
    """Silence the connections of an idle worker, and publish at once, past the wire."""
    stage.worker(stage.wire.url)
    stage.finish(stage.load("before", messages=20, rate=0, pad=_PAD))
    stage.until_count("done", 20, _AT_WORK)
    gate = str(stage.folder / "gate")
    os.mkfifo(gate)
    load = stage.load("open", messages=_MESSAGES, rate=_RATE, pad=_PAD, KQ_TEST_CHAOS_GATE=gate)
    stage.pause(0.0, 1.0)
    stage.wire.freeze()
    frozen = monotonic()
    os.close(os.open(gate, os.O_WRONLY))
    stage.finish(load)
    # Some look at their connections only once a minute: nothing but the end of the rest ends this wait.
    stage.rest(quiet=60.0)
    later = [line.at - frozen for line in stage.history.lines("started") if line.id.startswith("open-")]
    if later:
        stage.figures["recovery"] = round(later[0], 1)


def redis_full(stage: Stage) -> None:
    """Publish until Redis refuses, then consume while another producer keeps it full; restart a worker that ends."""
    stage.finish(stage.load("fill", messages=10_000, rate=0, pad=_FAT, KQ_TEST_CHAOS_REFUSALS="20"))
    stage.figures["stored"] = stored = stage.history.count("acked")
    stage.keep(stage.worker())
    # It may never begin.
    stage.until_count("started", 1, _AT_WORK)
    # A refused publish takes some of them long.
    stage.finish(stage.load("again", messages=_MESSAGES, rate=_RATE, pad=_FAT, KQ_TEST_CHAOS_SECONDS="10"))
    stage.figures["refilled"] = stage.history.count("acked") - stored
    stage.rest()


FAULTS: Final[Mapping[str, Fault]] = {
    fault.name: fault
    for fault in (
        Fault("consumers-killed", consumers_killed),
        Fault("half-open", half_open),
        Fault("redis-full", redis_full, ("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")),
    )
}
