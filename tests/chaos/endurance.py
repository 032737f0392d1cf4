"""Long runs: a soak with faults all the time, and doing nothing for long."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Final

from tests.chaos.process import Program, cpu, descriptors, memory
from tests.chaos.scenario import SHARED, scenario
from tests.chaos.site import RedisSite
from tests.chaos.stage import Stage

endurance = partial(scenario, "endurance", on=SHARED, long=True, wired=True)

#: Seconds that a soak lasts, after warming up.
_SOAK: Final = {"brief": 60.0, "standard": 300.0, "full": 1800.0}
_WARM: Final = {"brief": 10.0, "standard": 60.0, "full": 300.0}
#: Seconds of doing nothing.
_IDLE: Final = {"brief": 20.0, "standard": 120.0, "full": 600.0}
#: Bytes that a supervisor may grow in ten minutes, once it is warm; and what a short measurement is uncertain by.
_SLOPE: Final = 2**20
_NOISE: Final = 2**20
#: The keys of a queue at rest: its arguments, its last token, its consumers, and of the dead letters the arguments.
_KEYS: Final = {":q", ":n", ":c", ".dead:q"}


@endurance()
def soak(stage: Stage) -> None:
    """200 messages a second with a fault every few seconds: nothing lost; memory, descriptors and keys stay flat."""
    seconds, warm = _SOAK[stage.size.name], _WARM[stage.size.name]
    arguments = ("-p", "2", "-c", "4", "--max-tasks-per-child", "500")
    steady = stage.worker(*arguments)
    stage.worker(*arguments)
    load = stage.load(messages=int((seconds + warm) * 200), rate=200, tries=30)
    faults: list[Callable[[], object]] = [
        lambda: _kill_child(stage),
        lambda: _kill_other(stage, steady, arguments),
    ]
    if stage.site.kind != "sqlite":
        faults.append(stage.wire.reset_all)
    every = 60.0 if stage.size.name == "full" else 5.0
    began = monotonic()
    counted, samples = 0, list[tuple[float, int, int]]()
    while load.alive and monotonic() - began < seconds + warm:
        stage.pause(every * 0.5, every * 1.5)
        stage.rng.choice(faults)()
        counted += 1
        if monotonic() - began > warm:
            samples.append((monotonic(), memory(steady.pid), descriptors(steady.pid)))
    stage.finish(load)
    stage.drain()
    stage.figures["faults"] = counted
    _expect_flat(stage, samples)
    if isinstance(stage.site, RedisSite):
        stage.stop_workers()
        left = set(stage.site.keys(stage.queue)) - _KEYS
        stage.expect(not left, f"keys are left at rest: {left}")
    stage.balance(duplicates=counted * 200)
    stage.stop_workers()


def _kill_child(stage: Stage) -> None:
    with suppress(ProcessLookupError):
        os.kill(stage.child(stage.rng.choice(stage.workers)), signal.SIGKILL)


def _kill_other(stage: Stage, steady: Program, arguments: tuple[str, ...]) -> None:
    for worker in [worker for worker in stage.workers if worker is not steady]:
        worker.kill()
        stage.replace(worker, *arguments)


def _expect_flat(stage: Stage, samples: list[tuple[float, int, int]]) -> None:
    if len(samples) < 4:
        return
    quarter = max(1, len(samples) // 4)
    first, last = samples[:quarter], samples[-quarter:]
    minutes = (last[0][0] - first[0][0]) / 60
    growth = sum(s[1] for s in last) / quarter - sum(s[1] for s in first) / quarter
    stage.figures["kib_per_10_min"] = round(growth / 1024 / max(minutes, 1e-9) * 10)
    stage.expect(
        growth <= _SLOPE * minutes / 10 + _NOISE, f"the supervisor grew by {growth / 1024:.0f} KiB in {minutes:.1f} min"
    )
    fds = [s[2] for s in samples]
    stage.figures["descriptors"] = max(fds)
    stage.expect(max(s[2] for s in last) <= max(s[2] for s in first) + 4, f"descriptors: {fds[0]}, then {fds[-1]}")


@endurance()
def idle(stage: Stage) -> None:
    """A worker with nothing to do: at most 0.5 % CPU for each process, at most 2 broker commands a second."""
    # As people run it, not with the short leases of the other scenarios.
    stage.environment.update(KQ_LEASE="30", KQ_HEARTBEAT="30")
    worker = stage.worker("-p", "2", "-c", "8")
    stage.publish("warm", ms=0)
    stage.until_count("done", 1)
    stage.pause(5.0)
    pids = [worker.pid, *worker.children()]
    used = {pid: cpu(pid) for pid in pids}
    commands = _commands(stage)
    began = monotonic()
    stage.pause(_IDLE[stage.size.name])
    seconds = monotonic() - began
    sent = (_commands(stage) - commands) / seconds
    worst = max(100 * (cpu(pid) - used[pid]) / seconds for pid in pids)
    stage.figures.update(seconds=round(seconds), cpu_percent=round(worst, 2), commands_a_second=round(sent, 2))
    stage.expect(worst <= 0.5, f"{worst:.2f} % CPU")
    stage.expect(sent <= 2.0, f"{sent:.2f} commands a second")
    published = monotonic()
    stage.publish("after", ms=0)
    stage.figures["latency"] = round(stage.next_start(published - 0.001), 3)
    stage.expect(stage.figures["latency"] < 0.5, f"a message after that came after {stage.figures['latency']} s")
    stage.drain()
    stage.balance()
    stage.stop_workers()


def _commands(stage: Stage) -> int:
    """Return how often the worker has sent something so far."""
    return 0 if stage.site.kind == "sqlite" else stage.wire.sent
