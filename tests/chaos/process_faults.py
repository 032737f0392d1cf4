"""Children and supervisors that are killed, stopped and continued; and messages that do it themselves."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from typing import Final

from tests.chaos.process import gone, is_alive, memory
from tests.chaos.scenario import SHARED, scenario
from tests.chaos.stage import HEARTBEAT, LEASE, ORPHANS_WITHIN, Stage

process_fault = partial(scenario, "processes")

#: Seconds within which a message of a supervisor that died must run again.
_RECOVERY: Final = {"rabbitmq": 1.0, "redis": LEASE + 1.5, "sqlite": LEASE + 1.5}
#: What a worker's start may add to that: a fresh interpreter that loads kq, on a busy machine.
_START: Final = 2.5
#: Seconds from a handler's effect until its supervisor knows of it, on a busy machine.
_REPORTED_WITHIN: Final = 0.5
#: Ways for a message to take its process with it. From Python 3.12 on recursion in C is an exception at any limit.
_DEADLY: Final = (
    "segfault", "exit 0", "exit 1", "abort", "kill", "grow and die", "fork and die",
    *(["recurse"] if sys.version_info < (3, 12) else []),
)  # fmt: skip
#: How the death is described: a signal's number, or an exit code.
_SIGNALS: Final = {
    "segfault": signal.SIGSEGV, "abort": signal.SIGABRT, "kill": signal.SIGKILL, "recurse": signal.SIGSEGV,
    "grow and die": signal.SIGKILL, "fork and die": signal.SIGKILL,
}  # fmt: skip


@process_fault(quick=("sqlite", "redis"))
def child_killed(stage: Stage) -> None:
    """Children killed in the middle of tasks: nothing lost, only what ran is charged, they are replaced within 2 s."""
    # By chance one may be hit several times; whoever is killed from outside is not to blame.
    stage.declare = {"max_crashes": 50, "max_attempts": 50}
    worker = stage.worker("-p", "2", "-c", "2")
    load = stage.load(messages=stage.size.kills * 8, rate=0, ms=250)
    killed: dict[int, float] = {}
    for _ in range(stage.size.kills):
        stage.pause(0.3, 0.7)
        victim = stage.child(worker)
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            killed[victim] = monotonic()
        stage.until(lambda victim=victim: victim not in worker.children(), "the child to be buried")  # type: ignore[misc]
        stage.until(lambda: len(worker.children()) == 2, "a new child", 2.0)
    stage.finish(load)
    stage.drain()
    starts = stage.history.lines("started")
    # What ran when its process was killed has a start without an end in that process. A handler that had its effect
    # just before may not have been reported yet: to its worker it was running.
    ends = {
        (line.id, line.pid) for line in stage.history.lines("done")
        if line.at < killed.get(line.pid, inf) - _REPORTED_WITHIN
    }  # fmt: skip
    cut = {line.id for line in starts if line.pid in killed and (line.id, line.pid) not in ends}
    charged = {line.id for line in starts if line.attempt > 1}
    stage.expect(charged <= cut, f"charged although they did not run in a killed child: {sorted(charged - cut)[:5]}")
    stage.expect(worker.alive, "the supervisor went with its child")
    stage.balance(duplicates=stage.size.kills * 2)
    stage.stop_workers()


@process_fault(quick=SHARED)
def supervisor_killed(stage: Stage) -> None:
    """Supervisors killed under load: nothing lost, nobody charged, no orphan 2 s later, work goes on in time."""
    _kill_workers(stage, whole=False)


@process_fault()
def machine_dies(stage: Stage) -> None:
    """A supervisor and all its children killed at the same instant, under load: nothing lost, nobody charged."""
    _kill_workers(stage, whole=True)


def _kill_workers(stage: Stage, *, whole: bool) -> None:
    arguments = ("-p", "2", "-c", "2")
    stage.worker(*arguments)
    stage.worker(*arguments)
    load = stage.load(messages=stage.size.messages, ms=5)
    for _ in range(stage.size.kills):
        stage.pause(0.4, 1.0)
        victim = stage.rng.choice(stage.workers)
        children = victim.children()
        if whole:
            victim.kill_tree()
        else:
            victim.kill()
        stage.replace(victim, *arguments)
        stage.expect(gone(children, ORPHANS_WITHIN), "children outlived their supervisor")
    stage.finish(load)
    stage.drain()
    stage.expect({line.attempt for line in stage.history.lines("started")} == {1}, "somebody was charged")
    # What ran, and what was done and not yet acknowledged: a batch for each child, and what travels.
    stage.balance(duplicates=stage.size.kills * (4 + 2 * 64))
    stage.stop_workers()


@process_fault(quick=("redis",))
def lone_supervisor_killed(stage: Stage) -> None:
    """The only supervisor killed while it runs a task: another runs it within a lease, on RabbitMQ within a second."""
    worker = stage.worker("-p", "1", "-c", "1")
    stage.publish("long", plan=["sleep"], ms=0)
    stage.until_count("started", 1)
    heir = stage.worker("-p", "1", "-c", "1")
    stage.until(lambda: "ready" in heir.log or heir.children(), "the heir's child")
    stage.pause(0.0, LEASE)
    killed_at = monotonic()
    worker.kill()
    took = stage.next_start(killed_at)
    stage.figures["recovery"] = round(took, 2)
    stage.expect(took <= _RECOVERY[stage.site.kind] + _START, f"ran again after {took:.1f} s")
    stage.expect([line.attempt for line in stage.history.lines("started")] == [1, 1], "it was charged")


@process_fault(quick=("redis",))
def child_stopped(stage: Stage) -> None:
    """A child stopped for three leases and continued: nothing runs twice, nobody is charged."""
    worker = stage.worker("-p", "1", "-c", "2")
    stage.publish("a", ms=600)
    stage.publish("b", ms=600)
    stage.until_count("started", 2)
    (victim,) = worker.children()
    os.kill(victim, signal.SIGSTOP)
    other = stage.worker("-p", "1", "-c", "2")
    stage.pause(3 * LEASE)
    stage.expect(stage.history.count("started") == 2, "its messages were given to somebody else")
    os.kill(victim, signal.SIGCONT)
    stage.drain()
    stage.expect(other.alive, "the other worker ended")
    stage.expect({line.attempt for line in stage.history.lines("started")} == {1}, "somebody was charged")
    stage.balance()
    stage.stop_workers()


@process_fault(quick=("sqlite",))
def child_stopped_past_its_limit(stage: Stage) -> None:
    """A child stopped past a task's time limit is killed; the task is charged one attempt, as late, and no crash."""
    stage.consumer = {"timeout": 1.0}
    worker = stage.worker("-p", "1", "-c", "1")
    stage.publish("late", ms=500)
    stage.until_count("started", 1)
    (victim,) = worker.children()
    os.kill(victim, signal.SIGSTOP)
    stopped_at = monotonic()
    stage.expect(gone([victim], 6.0), "it was not killed")
    stage.figures["killed_after"] = round(monotonic() - stopped_at, 2)
    stage.drain()
    stage.expect([line.attempt for line in stage.history.lines("started")] == [1, 2], "it was not charged once")
    stage.expect([line.text for line in stage.history.lines("started")][-1] == "deliveries 0", "a crash was charged")
    stage.balance()
    stage.stop_workers()


@process_fault(quick=("redis",))
def supervisor_stopped(stage: Stage) -> None:
    """A supervisor stopped for longer than its lease: others take over, its late answers change nothing."""
    sleeper = stage.worker("-p", "1", "-c", "2")
    stage.publish("a", ms=800)
    stage.publish("b", ms=800)
    stage.until_count("started", 2)
    sleeper.signal(signal.SIGSTOP)
    heir = stage.worker("-p", "1", "-c", "2")
    # RabbitMQ gives up a connection after two heartbeats that it missed.
    stage.until_count("started", 4, within=LEASE + 3 * HEARTBEAT + 5)
    stage.until_count("done", 4)
    sleeper.signal(signal.SIGCONT)
    load = stage.load(messages=50, rate=100)
    stage.finish(load)
    stage.drain()
    stage.expect(sleeper.alive and heir.alive, "a worker ended")
    stage.expect({line.attempt for line in stage.history.lines("started")} == {1}, "somebody was charged")
    stage.balance(duplicates=2)
    stage.stop_workers()


@process_fault(quick=("redis",))
def stopped_during_a_task(stage: Stage) -> None:
    """TERM during tasks: they are finished, nothing new starts, the rest is back at once and uncharged, exit 0."""
    worker = stage.worker("-p", "1", "-c", "2", "--grace", "10s")
    for n in range(12):
        stage.publish(f"m{n}", ms=1500)
    stage.until_count("started", 2)
    stage.pause(0.0, 1.0)
    told_at = monotonic()
    worker.signal(signal.SIGTERM)
    stage.until(lambda: stage.site.ready(stage.queue) >= 9, "the rest to be back", 3.0)
    stage.figures["back_after"] = round(monotonic() - told_at, 2)
    stage.expect(worker.wait(12) == 0, "it did not exit with 0")
    stage.workers.remove(worker)
    starts = stage.history.lines("started")
    stage.expect(all(line.at <= told_at + 0.2 for line in starts), "something started after TERM")
    stage.expect(len(starts) == stage.history.count("done"), "what ran was not finished")
    stage.worker("-p", "1", "-c", "8")
    stage.drain()
    stage.expect({line.attempt for line in stage.history.lines("started")} == {1}, "somebody was charged")
    stage.balance()
    stage.stop_workers()


@process_fault(quick=("sqlite",))
def grace_too_short(stage: Stage) -> None:
    """TERM, and a task that outlives the grace: it is killed, runs elsewhere within a second, and is not charged."""
    worker = stage.worker("-p", "1", "-c", "1", "--grace", "1s")
    stage.publish("long", ms=0, plan=["sleep"])
    stage.until_count("started", 1)
    heir = stage.worker("-p", "1", "-c", "1")
    stage.until(heir.children, "the heir's child")
    told_at = monotonic()
    worker.signal(signal.SIGTERM)
    stage.expect(worker.wait(10) == 0, "it did not exit with 0")
    ended_at = monotonic()
    stage.workers.remove(worker)
    stage.figures["exit_after"] = round(ended_at - told_at, 2)
    stage.expect(ended_at - told_at <= 1.0 + 3.0, f"it took {ended_at - told_at:.1f} s to exit")
    stage.until_count("started", 2, within=_START + 1.0)
    stage.expect([line.attempt for line in stage.history.lines("started")] == [1, 1], "it was charged")


@process_fault(quick=SHARED)
def poison(stage: Stage) -> None:
    """A message that kills its process starts exactly three times and is dead; a thousand innocents are all done."""
    deadly = stage.rng.choice(_DEADLY)
    worker = stage.worker("-p", "2", "-c", "4")
    before = memory(worker.pid)
    innocents = {"brief": 200, "standard": 500, "full": 1000}[stage.size.name]
    load = stage.load(messages=innocents, rate=0, ms=20)
    stage.until_count("done", innocents // 10)
    stage.publish("poison", ms=20, plan=[deadly])
    stage.finish(load)
    stage.until(lambda: stage.site.dead(stage.queue), "the dead letter")
    stage.drain()
    starts = [line.id for line in stage.history.lines("started")].count("poison")
    stage.expect(starts == 3, f"{deadly}: it started {starts} times, not 3")
    stage.balance(dead=1, duplicates=3 * 8)
    _expect_crash_loop(stage, "poison", deadly)
    stage.expect(memory(worker.pid) - before < 32 * 2**20, "the supervisor has grown by more than 32 MiB")
    left = [pid for pid in _members(stage) if is_alive(pid)]
    stage.expect(not left, f"processes of handlers were left behind: {left}")
    stage.stop_workers()


def _expect_crash_loop(stage: Stage, id: str, deadly: str) -> None:
    letter = stage.letter(id)
    stage.expect(letter.reason == "crash_loop", f"{deadly}: the reason is {letter.reason}")
    stage.expect(letter.crashes == 3, f"{deadly}: {letter.crashes} crashes")
    if deadly in _SIGNALS:
        stage.expect(letter.exit_signal == _SIGNALS[deadly], f"{deadly}: signal {letter.exit_signal}")
    else:
        code = int(deadly.removeprefix("exit "))
        stage.expect(letter.exit_code == code, f"{deadly}: code {letter.exit_code}")
    least = (64 if deadly == "grow and die" else 5) * 2**20
    stage.expect((letter.peak_memory or 0) > least, f"{deadly}: peak memory {letter.peak_memory}")


def _members(stage: Stage) -> list[int]:
    """Return the processes whose session is that of a child that ran the poison."""
    sessions = {line.pid for line in stage.history.lines("started", "poison")}
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if os.getsid(int(name)) in sessions and int(name) not in sessions:
                    found.append(int(name))
    return found


@process_fault()
def poisons_among_innocents(stage: Stage) -> None:
    """Several deadly messages at once, in a crowd: each starts exactly three times, no innocent is dead or charged."""
    stage.worker("-p", "2", "-c", "4")
    load = stage.load(messages=300, rate=0, ms=30)
    stage.until_count("done", 20)
    kinds = stage.rng.sample(_DEADLY, 4)
    for n, deadly in enumerate(kinds):
        stage.publish(f"poison-{n}", ms=stage.rng.randrange(60), plan=[deadly])
    stage.finish(load)
    stage.until(lambda: len(stage.site.dead(stage.queue)) == len(kinds), "the dead letters", 90)
    stage.drain()
    starts = Counter(line.id for line in stage.history.lines("started"))
    for n, deadly in enumerate(kinds):
        # Another one may end the process just before this one's handler can write that it began.
        stage.expect(2 <= starts[f"poison-{n}"] <= 3, f"{deadly}: started {starts[f'poison-{n}']} times, not 3")
        _expect_crash_loop(stage, f"poison-{n}", deadly)
    stage.balance(dead=len(kinds), duplicates=12 * 8)
    stage.stop_workers()


@process_fault(quick=("redis",))
def attempts_across_crashes(stage: Stage) -> None:
    """Failures and crashes by turns count as one series of attempts: five starts, then dead."""
    stage.declare = {"max_attempts": 5, "max_crashes": 4}
    stage.worker("-p", "1", "-c", "1")
    stage.publish("m", ms=0, plan=["fail", "kill", "fail", "segfault", "fail"])
    stage.until(lambda: stage.site.dead(stage.queue), "the dead letter")
    attempts = [line.attempt for line in stage.history.lines("started")]
    stage.expect(attempts == [1, 2, 3, 4, 5], f"attempts: {attempts}")
    stage.expect(stage.letter("m").reason == "max_attempts", f"the reason is {stage.letter('m').reason}")
    stage.drain()
    stage.balance(dead=1)
    stage.stop_workers()


@process_fault(quick=("sqlite",))
def harmless_exits(stage: Stage) -> None:
    """``sys.exit``, KeyboardInterrupt and MemoryError are a handler's failures: no crash, retried, then done."""
    stage.worker("-p", "1", "-c", "2")
    acts = ["sys.exit", "interrupt", "memory error", "fail"]
    for n, act in enumerate(acts):
        stage.publish(f"m{n}", ms=0, plan=[act, "ok"])
    stage.publish("told to end", ms=0, plan=["term"])
    stage.drain()
    for n, act in enumerate(acts):
        lines = stage.history.lines("started", f"m{n}")
        stage.expect([line.attempt for line in lines] == [1, 2], f"{act}: attempts {[line.attempt for line in lines]}")
        stage.expect(all(line.text == "deliveries 0" for line in lines), f"{act}: counted as a crash")
    stage.balance()
    stage.stop_workers()


@process_fault(quick=("sqlite",))
def memory_runs_out(stage: Stage) -> None:
    """A handler that runs out of memory fails its attempt, and its process is replaced."""
    worker = stage.worker("-p", "1", "-c", "1")
    (before,) = stage.until(worker.children, "the child")
    stage.publish("m", ms=0, plan=["memory error", "ok"])
    stage.drain()
    stage.until(lambda: before not in worker.children(), "the child to be replaced", 10.0)
    stage.balance()
    stage.stop_workers()


@process_fault(quick=("redis",))
def recycled_under_load(stage: Stage) -> None:
    """Children replaced after every ten messages, under load: nothing lost, nothing twice."""
    stage.worker("-p", "2", "-c", "4", "--max-tasks-per-child", "10")
    messages = {"brief": 150, "standard": 300, "full": 1000}[stage.size.name]
    load = stage.load(messages=messages, rate=40)
    stage.finish(load)
    stage.drain()
    stage.balance()
    children = {line.pid for line in stage.history.lines("started")}
    stage.expect(len(children) >= 3, f"only {len(children)} children have run {messages} messages")
    stage.stop_workers()


@process_fault(quick=("sqlite",), on=SHARED)
def app_does_not_import(stage: Stage) -> None:
    """Children that cannot load the app: the worker ends with 78, and the queue is as it was."""
    for n in range(5):
        stage.publish(f"m{n}")
    worker = stage.worker("-p", "1", ready=False, broken=True)
    stage.expect(worker.wait(60) == 78, f"exit code {worker.wait(1)}")
    stage.workers.remove(worker)
    stage.worker("-p", "1")
    stage.drain()
    stage.expect({line.attempt for line in stage.history.lines("started")} == {1}, "somebody was charged")
    stage.balance()
    stage.stop_workers()


@process_fault(quick=("redis",), site={})
def killer_of_workers(stage: Stage) -> None:
    """A message that kills worker after worker ends as crash_loop after max_deliveries; it runs alone by then."""
    _kill_workers_from_within(stage)


@process_fault(on=("rabbitmq",), quick=("rabbitmq",))
def killer_of_workers_with_priorities(stage: Stage) -> None:
    """The same on a RabbitMQ queue with priorities, whose deliveries the broker itself does not count."""
    stage.declare = {"max_priority": 9}
    _kill_workers_from_within(stage)


def _kill_workers_from_within(stage: Stage) -> None:
    stage.environment["KQ_MAX_DELIVERIES"] = "4"
    stage.publish("killer", ms=100, plan=["kill the worker"])
    for n in range(10):
        stage.publish(f"m{n}", ms=200)
    deadline = monotonic() + 90
    while not stage.site.dead(stage.queue):
        stage.expect(monotonic() < deadline, "it did not end")
        if stage.failures:
            return
        if not any(worker.alive for worker in stage.workers):
            stage.workers.clear()
            stage.worker("-p", "1", "-c", "4", ready=False)
        stage.pause(0.05)
    starts = [line.id for line in stage.history.lines("started")].count("killer")
    stage.expect(starts == 4, f"it started {starts} times, not 4")
    stage.expect(stage.letter("killer").reason == "crash_loop", f"the reason is {stage.letter('killer').reason}")
    stage.drain()
    stage.balance(dead=1, duplicates=10 * 4)
    stage.stop_workers()


@process_fault(on=("rabbitmq",), quick=())
def broker_counts_deliveries(stage: Stage) -> None:
    """A RabbitMQ queue with x-delivery-limit 3, poison and dying workers: no innocent is dead."""
    stage.declare = {"options": {"amqp": {"arguments": {"x-delivery-limit": 3}}}}
    arguments = ("-p", "1", "-c", "2", "--prefetch", "10")
    stage.worker(*arguments)
    load = stage.load(messages=200, rate=0, ms=40)
    stage.publish("poison", ms=20, plan=["segfault"])
    for _ in range(2):
        stage.pause(1.0, 2.0)
        victim = stage.workers[0]
        victim.kill()
        stage.replace(victim, *arguments)
    stage.finish(load)
    stage.until(lambda: "poison" in stage.site.dead(stage.queue), "the dead letter")
    stage.drain()
    stage.balance(dead=1, duplicates=2 * 20)
    stage.stop_workers()
