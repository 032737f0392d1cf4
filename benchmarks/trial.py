"""What is measured: each trial is one thing that a contender is asked to do, and gives one or more figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from benchmarks import scale
from benchmarks.apps.publishing import THREADS, TOGETHER
from benchmarks.bare import DRAINS
from benchmarks.contender import BARE, Contender
from benchmarks.measure import Bench
from benchmarks.publish import Order

#: Messages by which a publisher has connected and declared what it needs.
_WARM: Final = 20
#: A part of the messages is enough where handlers take long...
_SLOW_PART: Final = 5
#: ...or where they are large; not a smaller one, or what a worker has fetched before its first handler runs decides.
_LARGE_PART: Final = 10
#: Of messages that fail once: about as many as are handled twice, and for Celery a few seconds.
_RETRY_PART: Final = 2
#: Messages that follow on each that is published, where handlers publish.
_CHAIN: Final = 4
#: Messages a second of a load that is the same for everybody: about half of what the slowest of those can drain that
#: are not meant to be slow.
_LOAD: Final = 500.0
#: Seconds by which messages are delayed: more than a contender takes to publish as many as are measured.
_DELAY: Final = 2.0


@dataclass(frozen=True)
class Size:
    """How much to measure.

    Attributes:
        messages: Of a backlog, and published one at a time: for a tenth of a second the system may have publisher and
            broker take turns on one core, where each takes a third of the time that it takes from then on.
        samples: Messages whose latency is measured.
    """

    messages: int = 20_000
    samples: int = 500


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        title: What people read.
        unit: Its unit.
        more: Whether more is better.
    """

    title: str
    unit: str
    more: bool = True


#: What contenders are compared by, in the order of the table.
FIGURES: Final[Mapping[str, Figure]] = {
    "publish": Figure("publish, one at a time", "/s"),
    "bulk": Figure("publish in bulk", "/s"),
    "threads": Figure(f"publish from {THREADS} threads", "/s"),
    "task": Figure("await, one at a time", "/s"),
    "tasks": Figure(f"await in {TOGETHER} tasks", "/s"),
    "drain": Figure("drain a backlog", "/s"),
    "cpu": Figure("CPU of the worker", "s per 1,000", more=False),
    "idle-p50": Figure("publish to start, idle, p50", "ms", more=False),
    "idle-p99": Figure("publish to start, idle, p99", "ms", more=False),
    "loaded-p50": Figure("publish to start, 500/s, p50", "ms", more=False),
    "loaded-p99": Figure("publish to start, 500/s, p99", "ms", more=False),
    "late-p50": Figure("delayed by 2 s: late by, p50", "ms", more=False),
    "late-p99": Figure("delayed by 2 s: late by, p99", "ms", more=False),
    "start": Figure("start of a worker to its first handler", "s", more=False),
    "first": Figure("start of a publisher to its first message", "s", more=False),
    "memory": Figure("memory of an idle worker", "MiB", more=False),
    "chain": Figure("drain, each publishes the next, sync", "/s"),
    "achain": Figure("drain, each publishes the next, async", "/s"),
    "retry": Figure("drain, each fails once", "/s"),
    "compute": Figure("drain, 1 ms of CPU each", "/s"),
    "sleep": Figure("drain, sleep 10 ms, sync", "/s"),
    "asleep": Figure("drain, sleep 10 ms, async", "/s"),
    "drain-10k": Figure("drain, 10 KB each", "/s"),
    "publish-10k": Figure("publish, 10 KB, one at a time", "/s"),
    "drain-500k": Figure("drain, 500 KB each", "/s"),
    "publish-500k": Figure("publish, 500 KB, one at a time", "/s"),
}

#: What kq alone is measured at.
SCALE_FIGURES: Final[Mapping[str, Figure]] = {
    "plain": Figure("drain of one queue, without anything else", "/s"),
    "backlog": Figure("with a backlog fifty times as long", "x"),
    "queues": Figure("from 100 queues of 1,000", "x"),
    "headers": Figure("with 30 headers each", "x"),
    "priorities": Figure("with three priorities", "x"),
    "waiting": Figure("with fifty times as many delayed ones waiting", "x"),
    "supervisor": Figure("CPU of a message in the supervisor", "µs", more=False),
    "children": Figure("CPU of a message in the child", "µs", more=False),
    "supervisors-1": Figure("1 supervisor of 8 threads, handlers of 10 ms", "/s"),
    "supervisors-2": Figure("2 supervisors", "/s"),
    "supervisors-4": Figure("4 supervisors", "/s"),
    "supervisors-8": Figure("8 supervisors", "/s"),
    "early": Figure("memory after a tenth of all messages", "MiB", more=False),
    "late": Figure("memory after all of them", "MiB", more=False),
}

Found = dict[str, float]


def _publish(contender: Contender, url: str, size: Size) -> Found:
    with Bench(contender, url) as bench:
        return {"publish": bench.publish(Order(size.messages, warm=_WARM))}


def _together(contender: Contender, url: str, size: Size) -> Found:
    ways = [*(["threads"] if contender.threads else []), *(["task", "tasks"] if contender.tasks else [])]
    found = {}
    for way in ways:
        with Bench(contender, url) as bench:
            found[way] = bench.publish(Order(size.messages, way, warm=_WARM))
    return found


def _drain(contender: Contender, url: str, size: Size) -> Found:
    with Bench(contender, url) as bench:
        bulk = bench.publish(Order(size.messages, "many", warm=_WARM))
        found = bench.drain(size.messages + _WARM)
        return {"bulk": bulk, "drain": found["drain"], "cpu": found["cpu"]}


def _idle(contender: Contender, url: str, size: Size) -> Found:
    with Bench(contender, url) as bench:
        found = bench.latency(100.0, size.samples)
        return {"idle-p50": found["p50"] * 1000, "idle-p99": found["p99"] * 1000}


def _loaded(contender: Contender, url: str, size: Size) -> Found:
    with Bench(contender, url) as bench:
        found = bench.latency(_LOAD, size.samples * 4)
        return {"loaded-p50": found["p50"] * 1000, "loaded-p99": found["p99"] * 1000}


def _late(contender: Contender, url: str, size: Size) -> Found:
    if not contender.delays:
        return {}
    with Bench(contender, url) as bench:
        found = bench.lateness(_DELAY, size.samples)
        return {"late-p50": found["p50"] * 1000, "late-p99": found["p99"] * 1000}


def _start(contender: Contender, url: str, size: Size) -> Found:
    with Bench(contender, url) as bench:
        first = bench.first()
    with Bench(contender, url) as bench:
        return {"start": bench.start(), "first": first}


def _memory(contender: Contender, url: str, size: Size) -> Found:
    with Bench(contender, url) as bench:
        return {"memory": bench.idle_memory()}


def _working(figure: str, work: str, style: str) -> Callable[[Contender, str, Size], Found]:
    def measure(contender: Contender, url: str, size: Size) -> Found:
        if style and style not in contender.styles:
            return {}
        messages = size.messages // _SLOW_PART
        with Bench(contender, url, work, style) as bench:
            bench.publish(Order(messages, "many"))
            return {figure: bench.drain(messages)["drain"]}

    return measure


def _chain(contender: Contender, url: str, size: Size) -> Found:
    ways = {"chain": ("sync", contender.threads), "achain": ("async", contender.tasks)}
    found = {}
    for figure, (style, can) in ways.items():
        if can and style in contender.styles:
            first = size.messages // (1 + _CHAIN)
            with Bench(contender, url, "chain", style) as bench:
                bench.publish(Order(first, "many", chain=_CHAIN))
                found[figure] = bench.drain(first * (1 + _CHAIN))["drain"]
    return found


def _retry(contender: Contender, url: str, size: Size) -> Found:
    if urlsplit(url).scheme not in contender.retries:
        return {}
    messages = size.messages // _RETRY_PART
    with Bench(contender, url, "fail") as bench:
        bench.publish(Order(messages, "many", numbered=True))
        return {"retry": bench.drain(messages)["drain"]}


def _payload(name: str, pad: int, part: int) -> Callable[[Contender, str, Size], Found]:
    def measure(contender: Contender, url: str, size: Size) -> Found:
        messages = max(20, size.messages // part)
        with Bench(contender, url) as bench:
            published = bench.publish(Order(messages, pad=pad, warm=1))
            return {f"publish-{name}": published, f"drain-{name}": bench.drain(messages + 1)["drain"]}

    return measure


def _publish_bare(broker: str, url: str, size: Size) -> Found:
    return _publish(BARE, url, size)


def _drain_bare(broker: str, url: str, size: Size) -> Found:
    with Bench(BARE, url) as bench:
        bulk = bench.publish(Order(size.messages, "many", warm=_WARM))
    return {"bulk": bulk, "drain": DRAINS[broker](url, size.messages, Order.pad)}


def _at_scale(measure: Callable[[Contender, str, int], Found]) -> Callable[[Contender, str, Size], Found]:
    return lambda contender, url, size: measure(contender, url, size.messages) if contender.bends else {}


#: What contenders are compared by, by name.
TRIALS: Final[Mapping[str, Callable[[Contender, str, Size], Found]]] = {
    "publish": _publish,
    "together": _together,
    "drain": _drain,
    "idle": _idle,
    "loaded": _loaded,
    "late": _late,
    "start": _start,
    "memory": _memory,
    "chain": _chain,
    "retry": _retry,
    "compute": _working("compute", "cpu", ""),
    "sleep": _working("sleep", "sleep", "sync"),
    "asleep": _working("asleep", "sleep", "async"),
    "10k": _payload("10k", 10_000, 1),
    "500k": _payload("500k", 500_000, _LARGE_PART),
}

#: What of it the bare client is measured at, where there is one for the broker.
LIMITS: Final[Mapping[str, Callable[[str, str, Size], Found]]] = {"publish": _publish_bare, "drain": _drain_bare}

#: What kq alone is measured at.
SCALE: Final[Mapping[str, Callable[[Contender, str, Size], Found]]] = {
    name: _at_scale(measure)
    for name, measure in {
        "backlog": scale.backlog,
        "queues": scale.queues,
        "headers": scale.headers,
        "priorities": scale.priorities,
        "waiting": scale.waiting,
        "stages": scale.stages,
        "supervisors": scale.supervisors,
        "endurance": scale.endurance,
    }.items()
}
