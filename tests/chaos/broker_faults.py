"""Brokers that are killed, restarted, full, blocked or misconfigured, and what somebody deletes under a worker."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final

import kq
from kq import errors
from tests.chaos.process import Program, cpu
from tests.chaos.scenario import SERVERS, scenario
from tests.chaos.site import RabbitSite, RedisSite, SQLiteSite
from tests.chaos.stage import Stage

broker_fault = partial(scenario, "brokers")

#: Seconds within which workers are at work again after their broker is back.
_RECOVERY: Final = 5.0
#: Messages that two workers of two processes hold at most in these runs, batches of acknowledgements included.
_IN_FLIGHT: Final = 400


def _bounces(stage: Stage) -> int:
    """Return how often a broker is killed: RabbitMQ takes ten seconds to come back."""
    few = {"brief": 1, "standard": 2, "full": 5}
    return few[stage.size.name] if stage.site.kind == "rabbitmq" else stage.size.kills // 2


def _let_the_queue_be_known(stage: Stage) -> None:
    """Wait until RabbitMQ has a new queue on disk.

    A node that is killed within half a second of a quorum queue's declaration does not find its log again; see
    ``auto_save`` in https://github.com/rabbitmq/ra/blob/main/src/ra_directory.erl. That is a fault of its own.
    """
    if stage.site.kind == "rabbitmq":
        stage.pause(2.0)


def _bounce(stage: Stage, end: str) -> None:
    stage.worker("-p", "2", "-c", "2")
    stage.worker("-p", "2", "-c", "2")
    load = stage.load(messages=3 * stage.size.messages, tries=20)
    _let_the_queue_be_known(stage)
    slowest = 0.0
    bounces = _bounces(stage)
    for _ in range(bounces):
        stage.pause(0.5, 1.2)
        getattr(stage.site, end)()
        stage.pause(0.1, 0.5)
        stage.site.start()
        back_at = monotonic()
        slowest = max(slowest, stage.next_start(back_at))
    stage.finish(load)
    stage.drain()
    stage.figures["recovery"] = round(slowest, 2)
    stage.expect(slowest <= _RECOVERY, f"work went on {slowest:.1f} s after the broker was back")
    stage.expect(all(worker.alive for worker in stage.workers), "a worker ended")
    stage.balance(duplicates=bounces * _IN_FLIGHT)
    stage.stop_workers()


@broker_fault(on=SERVERS, quick=("redis",))
def broker_killed(stage: Stage) -> None:
    """The broker killed and restarted under load: nothing lost, no false confirmation, work goes on within 5 s."""
    _bounce(stage, "kill")


@broker_fault(on=SERVERS)
def broker_restarted(stage: Stage) -> None:
    """The broker restarted in order under load: nothing lost, work goes on within 5 s."""
    _bounce(stage, "stop")


@broker_fault(on=SERVERS, wired=True, quick=("redis",))
def broker_away(stage: Stage) -> None:
    """The broker away for a while: publishers are told so in time, workers cost nothing and come back by themselves."""
    worker = stage.worker("-p", "1", "-c", "2")
    stage.publish("before")
    stage.until_count("done", 1)
    _let_the_queue_be_known(stage)
    stage.site.kill()
    with kq.App("publisher", broker=stage.url, publish_timeout=3.0) as app:
        for _ in range(3):
            began = monotonic()
            try:
                app.publish(stage.queue, {"id": "never", "ms": 0})
            except errors.Internal as error:
                stage.expect(error.retryable, "the error is not retryable")
                stage.expect(error.details.get("reason") == "unavailable", f"the reason is {error.details}")
            else:
                stage.expect(False, "a publish succeeded without a broker")
            stage.expect(monotonic() - began <= 3.5, f"a publish took {monotonic() - began:.1f} s")
    stage.pause(2.0)
    tries, used, since = stage.wire.accepted, cpu(worker.pid), monotonic()
    stage.pause({"brief": 5.0, "standard": 10.0, "full": 60.0}[stage.size.name])
    seconds = monotonic() - since
    stage.figures["cpu_percent"] = round(100 * (cpu(worker.pid) - used) / seconds, 2)
    tried = stage.wire.accepted - tries
    stage.figures["tries_a_second"] = round(tried / seconds, 2)
    stage.expect(stage.figures["cpu_percent"] < 5, f"an idle worker used {stage.figures['cpu_percent']} % CPU")
    # The first few follow each other faster.
    stage.expect(tried <= 3 + 1.5 * seconds, f"{tried} connections in {seconds:.1f} s")
    stage.site.start()
    back_at = monotonic()
    stage.publish("after")
    stage.figures["recovery"] = round(stage.next_start(back_at), 2)
    stage.expect(stage.figures["recovery"] <= _RECOVERY, f"work went on after {stage.figures['recovery']} s")
    stage.drain()
    stage.balance()
    stage.stop_workers()


@broker_fault(on=("rabbitmq",), quick=("rabbitmq",))
def memory_alarm(stage: Stage) -> None:
    """RabbitMQ takes no messages: publishers hear «blocked» within a second or so, consumers go on, nothing is lost."""
    _alarm(stage, ("set_vm_memory_high_watermark", "0"), ("set_vm_memory_high_watermark", "0.4"))


@broker_fault(on=("rabbitmq",))
def disk_alarm(stage: Stage) -> None:
    """The same where its disk is nearly full."""
    _alarm(stage, ("set_disk_free_limit", str(10**15)), ("set_disk_free_limit", "1MB"))


def _alarm(stage: Stage, on: tuple[str, ...], off: tuple[str, ...]) -> None:
    assert isinstance(stage.site, RabbitSite)
    stage.worker("-p", "1", "-c", "2")
    backlog = stage.load(prefix="backlog", messages=400, rate=0, ms=20)
    stage.finish(backlog)
    for n in range(10):
        # Each needs to be published again, by the worker.
        stage.publish(f"retried-{n}", ms=20, plan=["fail", "ok"])
    load = stage.load(messages=2000, rate=200, timeout=3.0, tries=30)
    stage.pause(0.2, 0.5)
    stage.site.control(*on)
    blocked_at = monotonic()
    stage.until(
        lambda: any(line.text.startswith("blocked") for line in stage.history.lines("rejected")),
        "a publisher to hear of it", 10.0,
    )  # fmt: skip
    before = stage.history.count("done")
    stage.pause(3.0, 5.0)
    went_on = stage.history.count("done") - before
    with stage.site.channel() as channel:
        waiting = int(channel.queue_declare(stage.queue, passive=True).message_count)
    stage.expect(went_on > 0 or waiting == 0, "consumers stood still")
    took = [float(line.text.split()[1]) for line in stage.history.lines("rejected") if line.text.startswith("blocked")]
    stage.figures["told_after"] = round(max(took[1:], default=0.0), 2)
    stage.expect(stage.figures["told_after"] <= 2.0, f"a publisher heard of it after {stage.figures['told_after']} s")
    stage.site.control(*off)
    stage.figures["alarm"] = round(monotonic() - blocked_at, 1)
    stage.finish(load)
    stage.drain()
    # A message that was sent before the publisher heard of it is stored later, and its next try once more.
    stage.balance(duplicates=len(stage.history.lines("rejected")))
    stage.stop_workers()


@broker_fault(
    on=("redis",), quick=("redis",), site={"redis": ("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")}
)
def redis_is_full(stage: Stage) -> None:
    """Redis at maxmemory: publishers hear «full», what is stored is consumed, retried, dead-lettered."""
    stage.consumer = {"max_attempts": 2}
    first = stage.load(messages=4000, rate=0, pad=3000, ms=0, tries=1, prefix="first")
    stage.finish(first)
    texts = {line.text.split()[0] for line in stage.history.lines("rejected")}
    stage.expect(texts == {"full"}, f"it never filled up, or publishers heard {texts or 'nothing'}")
    worker = stage.worker("-p", "1", "-c", "4")
    again = stage.load(messages=1500, rate=0, pad=3000, ms=0, tries=8, prefix="again")
    failing = stage.load(messages=40, rate=0, pad=3000, ms=0, tries=20, plan=["fail", "invalid"], prefix="failing")
    stage.finish(again)
    stage.finish(failing)
    stage.drain()
    stage.expect(worker.alive, "the worker ended")
    acked = sum(id.startswith("failing") for id in stage.history.ids("acked"))
    stage.balance(dead=acked)
    stage.stop_workers()


@broker_fault(on=("redis",), quick=("redis",))
def scripts_flushed(stage: Stage) -> None:
    """Redis forgets every script, again and again, under load: nobody notices."""
    assert isinstance(stage.site, RedisSite)
    stage.worker("-p", "2", "-c", "2")
    load = stage.load(messages=stage.size.messages)
    with closing(stage.site.client()) as client:
        while load.alive:
            client.script_flush()
            stage.pause(0.02, 0.1)
    stage.finish(load)
    stage.drain()
    stage.balance()
    stage.expect("ERROR" not in stage.logs(), "a worker logged an error")
    stage.stop_workers()


@broker_fault(on=("redis",), quick=("redis",))
def redis_settings(stage: Stage) -> None:
    """A Redis that evicts, or keeps nothing on disk: a worker warns once; with durability=required it ends with 78."""
    for arguments, word in ((("--maxmemory-policy", "allkeys-lru"), "allkeys-lru"), ((), "do not survive")):
        site = RedisSite(stage.folder, *arguments, persistent=bool(arguments))
        try:
            site.start()
            worker = stage.worker("-p", "1", url=site.url)
            stage.until(lambda word=word, worker=worker: word in worker.log, f"a warning of {word}")  # type: ignore[misc]
            worker.signal(signal.SIGTERM)
            worker.wait(20)
            stage.expect(worker.log.count(word) == 1, f"{worker.log.count(word)} warnings that name {word}")
            stage.environment["KQ_DURABILITY"] = "required"
            refused = stage.worker("-p", "1", url=site.url, ready=False)
            code = refused.wait(20)
            stage.expect(code == 78 and word in refused.log, f"exit code {code}: {refused.log}")
            stage.environment.clear()
            stage.workers.clear()
        finally:
            site.kill()


@broker_fault(quick=("redis", "rabbitmq"))
def queue_deleted(stage: Stage) -> None:
    """A queue deleted under a worker: it is made again, and what is published from then on is handled."""
    worker = stage.worker("-p", "1", "-c", "2")
    load = stage.load(messages=50, rate=0, ms=0)
    stage.finish(load)
    stage.drain()
    stage.site.forget(stage.queue)
    deleted_at = monotonic()
    # The first publish may find that the queue is gone: that is an error, and the next one makes it again.
    load = stage.load(messages=50, rate=20, ms=0, tries=20, timeout=5.0)
    stage.finish(load)
    stage.drain()
    stage.figures["recovery"] = round(stage.next_start(deleted_at), 2)
    stage.expect(worker.alive, "the worker ended")
    stage.balance()
    stage.stop_workers()


@broker_fault(quick=("redis", "rabbitmq"))
def dead_letter_queue_deleted(stage: Stage) -> None:
    """The dead-letter queue deleted under a worker: what must be dead-lettered still is."""
    stage.worker("-p", "1", "-c", "2")
    stage.publish("first", ms=0)
    stage.until_count("done", 1)
    site = stage.site
    if isinstance(site, RabbitSite):
        with site.channel() as channel:
            channel.queue_delete(stage.queue + ".dead")
            channel.exchange_delete(stage.queue + ".dead")
    elif isinstance(site, RedisSite):
        with closing(site.client()) as client:
            client.unlink(f"{{kq:{stage.queue}}}.dead:q")
    else:
        with closing(sqlite3.connect(site.path, timeout=20)) as db:  # type: ignore[attr-defined]
            db.execute("DELETE FROM queue WHERE name = ?", (stage.queue + ".dead",))
            db.commit()
    for n in range(5):
        stage.publish(f"bad-{n}", ms=0, plan=["invalid"])
    stage.until(lambda: len(site.dead(stage.queue)) == 5, "the dead letters", 20.0)
    stage.drain()
    stage.balance(dead=5)
    stage.stop_workers()


@broker_fault(on=("rabbitmq",), quick=("rabbitmq",))
def channels_closed(stage: Stage) -> None:
    """Connections and channels closed by RabbitMQ under load: workers are back within 5 s, nothing is lost."""
    assert isinstance(stage.site, RabbitSite)
    stage.worker("-p", "2", "-c", "2")
    # A publisher whose channel has gone without a word waits for as long as it may.
    load = stage.load(messages=stage.size.messages, rate=200, tries=20, timeout=_RECOVERY - 1.5)
    kills = max(2, stage.size.kills // 2)
    slowest = 0.0
    ways = (
        ("close_all_connections", "chaos"),
        ("eval", "[rabbit_channel:shutdown(P) || P <- rabbit_channel:list()]."),
        ("eval", "[exit(P, kill) || P <- rabbit_channel:list()]."),
    )
    for n in range(kills):
        stage.pause(0.2, 0.8)
        with suppress(AssertionError):
            # A channel that has gone meanwhile makes the command fail.
            stage.site.control(*ways[n % len(ways)])
        slowest = max(slowest, stage.next_start(monotonic(), 30.0, unless_over=load))
    stage.finish(load)
    stage.expect(slowest, "all was handled before the first fault")
    stage.drain()
    stage.figures["recovery"] = round(slowest, 2)
    stage.expect(slowest <= _RECOVERY, f"work went on after {slowest:.1f} s")
    stage.balance(duplicates=kills * _IN_FLIGHT)
    stage.stop_workers()


@broker_fault(on=("rabbitmq",), site={"rabbitmq": ("consumer_timeout = 3000",)})
def consumer_timeout(stage: Stage) -> None:
    """A task longer than RabbitMQ's consumer_timeout: the worker takes up its work again, and says why."""
    worker = stage.worker("-p", "1", "-c", "1")
    stage.publish("long", ms=7000)
    stage.until_count("started", 1)
    stage.until(lambda: "timed out" in worker.log or "timeout" in worker.log, "the log to name the cause", 30.0)
    named_at = monotonic()
    stage.publish("next", ms=0)
    stage.until(lambda: stage.history.lines("done", "next"), "the next message", 40.0)
    stage.figures["recovery"] = round(monotonic() - named_at, 2)
    stage.expect(worker.alive, "the worker ended")
    worker.signal(signal.SIGTERM)
    worker.wait(40)
    count = len(stage.history.lines("started", "long"))
    stage.expect(count <= 4, f"the long one started {count} times")


@broker_fault(on=("rabbitmq",), quick=("rabbitmq",))
def queue_declared_otherwise(stage: Stage) -> None:
    """A queue that exists with other arguments: the worker names the argument and ends with 78, at once."""
    assert isinstance(stage.site, RabbitSite)
    with stage.site.channel() as channel:
        channel.queue_declare(
            stage.queue, durable=True, auto_delete=False,
            arguments={
                "x-queue-type": "quorum", "x-max-length": 7, "x-dead-letter-exchange": stage.queue + ".dead",
                "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
            },
        )  # fmt: skip
    stage.declare = {"max_length": 5}
    began = monotonic()
    worker = stage.worker("-p", "1", ready=False)
    code = worker.wait(20)
    stage.figures["seconds"] = round(monotonic() - began, 1)
    stage.expect(code == 78, f"exit code {code}")
    stage.expect("x-max-length" in worker.log, f"the argument is not named: {worker.log}")
    stage.workers.clear()


@broker_fault(on=("rabbitmq",), quick=("rabbitmq",))
def worker_gets_nothing(stage: Stage) -> None:
    """A worker that is connected and gets nothing although messages wait notices it, says so, and consumes again."""
    assert isinstance(stage.site, RabbitSite)
    worker = stage.worker("-p", "1", "-c", "2")
    stage.publish("before", ms=0)
    stage.until_count("done", 1)
    # Forgotten by the broker, without a word to the client.
    stage.site.control(
        "eval",
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{stage.queue}">>)), '
        "[ra:process_command(amqqueue:get_pid(Q), "
        "rabbit_fifo:make_checkout({element(2, C), element(1, C)}, cancel, #{})) "
        "|| C <- rabbit_amqqueue:consumers(Q)].",
    )
    forgotten_at = monotonic()
    for n in range(5):
        stage.publish(f"m{n}", ms=0)
    stage.until_count("done", 6)
    stage.figures["recovery"] = round(monotonic() - forgotten_at, 1)
    stage.expect("gets nothing" in worker.log, "the worker did not say so")
    stage.drain()
    stage.balance()
    stage.stop_workers()


@broker_fault(on=("sqlite",), site={"sqlite": ("64m",)})
def disk_is_full(stage: Stage) -> None:
    """The disk under SQLite is full: publishers hear «full», what is stored is handled, later publishes succeed."""
    assert isinstance(stage.site, SQLiteSite)
    ballast = stage.site.folder / "ballast"
    stage.publish("first", ms=0)
    ballast.write_bytes(b"\0" * 44 * 2**20)
    worker = stage.worker("-p", "1", "-c", "2")
    load = stage.load(messages=3000, rate=0, pad=4000, ms=50, tries=1)
    stage.finish(load)
    told = {line.text.split()[0] for line in stage.history.lines("rejected")}
    ballast.unlink()
    more = stage.load(messages=200, rate=0, ms=0, tries=10, prefix="more")
    stage.finish(more)
    stage.drain()
    stage.expect(told == {"full"}, f"publishers heard {told}")
    stage.figures["refused"] = stage.history.count("rejected")
    stage.expect(worker.alive, "the worker ended")
    with closing(sqlite3.connect(stage.site.path)) as db:
        stage.expect(db.execute("PRAGMA integrity_check").fetchone()[0] == "ok", "the file is damaged")
    stage.balance(duplicates=64)
    stage.stop_workers()


@broker_fault(on=("sqlite",), quick=("sqlite",))
def power_cut(stage: Stage) -> None:
    """The SQLite file as a power cut would leave it, under load: it is whole, and has all that was confirmed."""
    assert isinstance(stage.site, SQLiteSite)
    worker = stage.worker("-p", "1", "-c", "2")
    load = stage.load(messages=stage.size.messages)
    stage.until_count("acked", 10)
    for n in range(stage.size.kills):
        stage.pause(0.05, 0.4)
        if not load.alive:
            break
        _check_copy(stage, stage.site, worker, load, stage.folder / f"copy-{n}")
    stage.finish(load)
    stage.drain()
    stage.balance(duplicates=0)
    stage.stop_workers()


def _check_copy(stage: Stage, site: SQLiteSite, worker: Program, load: Program, folder: Path) -> None:
    folder.mkdir()
    pids = [load.pid, worker.pid, *worker.children()]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    acked, started = set(stage.history.ids("acked")), set(stage.history.ids("started"))
    for suffix in ("", "-wal"):
        with suppress(FileNotFoundError):
            shutil.copy(f"{site.path}{suffix}", folder / f"kq.db{suffix}")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    with closing(sqlite3.connect(folder / "kq.db")) as db:
        stage.expect(db.execute("PRAGMA integrity_check").fetchone()[0] == "ok", "the file is damaged")
        stored = {row[0] for row in db.execute("SELECT id FROM message")}
    missing = acked - started - stored
    stage.expect(not missing, f"{len(missing)} confirmed messages are not in the file: {sorted(missing)[:5]}")
    shutil.rmtree(folder)


@broker_fault(on=("rabbitmq",), quick=("rabbitmq",))
def slow_handlers_and_a_backlog(stage: Stage) -> None:
    """Handlers that take long, of workers whose windows are wider than that: nobody takes them for cut off."""
    workers = [stage.worker("-p", "1", "-c", "3") for _ in range(2)]
    load = stage.load(messages=12, rate=0, ms=6000)
    stage.finish(load)
    stage.drain()
    stage.expect(not any("gets nothing" in worker.log for worker in workers), "a worker took its connection for dead")
    stage.balance(duplicates=0)
    stage.stop_workers()
