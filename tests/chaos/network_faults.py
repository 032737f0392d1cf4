"""Connections that are half open, cut in the middle of a frame, slow, clogged, refused; names that do not resolve."""

from __future__ import annotations

import signal
from functools import partial
from time import monotonic
from typing import Final

import kq
from kq import errors
from tests.chaos.process import cpu, descriptors
from tests.chaos.scenario import SERVERS, scenario
from tests.chaos.site import RabbitSite, RedisSite
from tests.chaos.stage import HEARTBEAT, LEASE, Stage

network_fault = partial(scenario, "network", on=SERVERS, wired=True)

#: Seconds within which messages reach a worker whose connection went silent: two heartbeats and a bit; on Redis a
#: blocked call, the timeout of the next one, and a lease.
_SILENT: Final = {"rabbitmq": 2 * HEARTBEAT + 2.0, "redis": 8.0}


@network_fault(quick=("redis", "rabbitmq"))
def half_open_consumer(stage: Stage) -> None:
    """A worker's connections go silent without being closed: it notices, connects anew and loses nothing."""
    worker = stage.worker("-p", "1", "-c", "4")
    stage.publish("before", ms=0)
    stage.until_count("done", 1)
    stage.pause(0.0, 1.0)
    stage.wire.freeze()
    frozen_at = monotonic()
    load = stage.load(url=stage.site.url, messages=100, rate=0, ms=0)
    stage.finish(load)
    stage.figures["recovery"] = round(stage.next_start(frozen_at), 2)
    stage.expect(stage.figures["recovery"] <= _SILENT[stage.site.kind] + 1, f"after {stage.figures['recovery']} s")
    stage.drain()
    stage.expect(worker.alive, "the worker ended")
    # Nothing of it was in hand.
    stage.balance()
    stage.stop_workers()


@network_fault(quick=("rabbitmq",))
def half_open_while_busy(stage: Stage) -> None:
    """The same while tasks run: each counts once, whether it is given out again or not; nothing is lost."""
    stage.worker("-p", "1", "-c", "4")
    load = stage.load(url=stage.site.url, messages=200, rate=0, ms=50)
    stage.until_count("done", 20)
    stage.wire.freeze()
    stage.finish(load)
    stage.drain()
    # Alone with its queue, a worker is given back only what it has already, and knows it.
    stage.balance(duplicates=8)
    stage.stop_workers()


@network_fault(quick=("rabbitmq",))
def half_open_publisher(stage: Stage) -> None:
    """A publisher's connection goes silent: it is told within its timeout, the next publish has a new connection."""
    stage.worker("-p", "1", url=stage.site.url)
    with kq.App("publisher", broker=stage.url, publish_timeout=2.0) as app:
        for n in range(6):
            id = f"m{n}"
            stage.note.write("attempted", id)
            if n % 2:
                (stage.wire.freeze if n % 4 == 1 else stage.wire.stall)()
            began = monotonic()
            try:
                app.publish(stage.queue, {"id": id, "ms": 0}, message_id=id)
            except errors.Internal as error:
                stage.note.write("rejected", id, 1, str(error.details.get("reason")))
                stage.expect(n % 2, f"a healthy publish failed: {error}")
            else:
                stage.note.write("acked", id)
            took = monotonic() - began
            stage.figures["slowest"] = max(stage.figures.get("slowest", 0.0), round(took, 2))
            stage.expect(took <= 2.5, f"a publish with a timeout of 2 s took {took:.1f} s")
            stage.wire.heal()
    stage.drain()
    stage.balance()
    stage.stop_workers()


@network_fault(quick=("rabbitmq",))
def clogged(stage: Stage) -> None:
    """Nothing is read from anybody any more: large publishes are told in time, workers recover when it is over."""
    worker = stage.worker("-p", "1", "-c", "4")
    stage.publish("before", ms=0)
    stage.until_count("done", 1)
    with kq.App("publisher", broker=stage.url, publish_timeout=2.0) as app:
        app.publish(stage.queue, {"id": "warm", "ms": 0}, message_id="warm")
        stage.note.write("attempted", "warm")
        stage.note.write("acked", "warm")
        # What is acknowledged into a clogged wire runs again, as it may.
        stage.drain()
        stage.wire.clog()
        for size in (10, 900_000):
            began = monotonic()
            try:
                app.publish(stage.queue, {"id": "never", "ms": 0, "pad": "x" * size}, message_id="never")
                stage.expect(False, "a publish into a clogged wire succeeded")
            except errors.Internal:
                pass
            stage.expect(monotonic() - began <= 2.6, f"a publish took {monotonic() - began:.1f} s")
        stage.pause(2 * HEARTBEAT)
        stage.wire.reset_all()
        stage.wire.heal()
    healed_at = monotonic()
    stage.note.write("attempted", "never")
    stage.publish("after", ms=0)
    stage.figures["recovery"] = round(stage.next_start(healed_at), 2)
    stage.expect(stage.figures["recovery"] <= 5.0, f"work went on after {stage.figures['recovery']} s")
    stage.drain()
    stage.expect(worker.alive, "the worker ended")
    stage.balance()
    stage.stop_workers()


@network_fault()
def cut_in_mid_frame(stage: Stage) -> None:
    """Connections cut after a few bytes of an answer, again and again: nothing lost, no answer taken for another's."""
    stage.worker("-p", "2", "-c", "4")
    load = stage.load(messages=stage.size.messages, rate=400, tries=30)
    cuts = 0
    while load.alive and cuts < 200:
        stage.wire.cut_after(stage.rng.randrange(1, 5000))
        stage.pause(0.02, 0.1)
        cuts += 1
    stage.finish(load)
    stage.drain()
    stage.figures["cuts"] = cuts
    stage.expect(not [id for id in stage.history.ids("done") if id.startswith("torn")], "a message arrived damaged")
    stage.balance(duplicates=cuts * 8)
    stage.stop_workers()


@network_fault(quick=("redis",))
def flapping(stage: Stage) -> None:
    """Every connection reset every second or so: nothing lost, nobody dead, no connection and no descriptor leaks."""
    workers = [stage.worker("-p", "1", "-c", "4") for _ in range(2)]
    seconds = {"brief": 6, "standard": 15, "full": 60}[stage.size.name]
    load = stage.load(messages=seconds * 100, rate=100, tries=30)
    long = stage.load(url=stage.site.url, messages=8, rate=0, ms=3000, prefix="long")
    stage.until_count("done", 10)
    before = [descriptors(worker.pid) for worker in workers]
    resets = 0
    until = monotonic() + seconds
    while monotonic() < until:
        stage.pause(0.5, 2.0)
        resets += stage.wire.reset_all()
    stage.finish(load)
    stage.finish(long)
    stage.drain()
    after = [descriptors(worker.pid) for worker in workers]
    stage.expect(all(b <= a + 3 for a, b in zip(before, after, strict=True)), f"descriptors: {before}, then {after}")
    if isinstance(stage.site, RabbitSite):
        count = len(stage.site.control("list_connections", "--no-table-headers", "pid").splitlines())
    else:
        assert isinstance(stage.site, RedisSite)
        count = len(stage.site.client().client_list())
    stage.figures["connections"] = count
    stage.expect(count <= 12, f"{count} connections are left")
    ran = [line.id for line in stage.history.lines("started") if line.id.startswith("long")]
    stage.figures["long_starts"] = len(ran)
    stage.balance(duplicates=resets * 16)
    stage.stop_workers()


@network_fault(on=("rabbitmq",), quick=("rabbitmq",))
def one_worker_flapping(stage: Stage) -> None:
    """The connection of the only worker reset again and again while it runs long tasks: each of them runs once."""
    stage.worker("-p", "1", "-c", "4")
    stage.finish(stage.load(url=stage.site.url, messages=8, rate=0, ms=2500))
    stage.until_count("started", 4)
    for _ in range(4):
        stage.pause(0.7, 1.0)
        stage.wire.reset_all()
    stage.drain()
    stage.expect(stage.history.count("started") == 8, f"{stage.history.count('started')} starts of 8 tasks")
    stage.balance()
    stage.stop_workers()


@network_fault(on=("rabbitmq",), quick=("rabbitmq",))
def late_confirms(stage: Stage) -> None:
    """Confirms that come after their publisher gave up are not credited to the next message: no false confirmation."""
    assert isinstance(stage.site, RabbitSite)
    stage.declare = {"max_length": 1}
    stage.publish("fills it", ms=0)
    with kq.App("publisher", broker=stage.url, publish_timeout=5.0) as app:
        app.queue(stage.queue, **stage.declare)
        app.queue(f"{stage.queue}-other")
        app.publish(f"{stage.queue}-other", {"n": 0})
        stage.wire.delay_down = 0.3
        with kq.App("hasty", broker=stage.url, publish_timeout=0.1) as hasty:
            hasty.queue(stage.queue, **stage.declare)
            for n in range(40):
                id = f"m{n}"
                stage.note.write("attempted", id)
                try:
                    hasty.publish(stage.queue, {"id": id, "ms": 0}, message_id=id)
                except errors.Internal as error:
                    stage.note.write("rejected", id, 1, str(error.details.get("reason")))
                else:
                    stage.note.write("acked", id)
        stage.wire.delay_down = 0.0
    stage.worker("-p", "1")
    stage.drain()
    stage.balance()
    stage.site.forget(f"{stage.queue}-other")
    stage.stop_workers()


@network_fault(quick=())
def slow_network(stage: Stage) -> None:
    """200 ms each way: no timeouts, nothing twice, and the worker's window keeps its handlers busy all the same."""
    stage.finish(stage.load(url=stage.site.url, messages=400, rate=0, ms=100))
    stage.wire.delay_up = stage.wire.delay_down = 0.2
    stage.worker("-p", "2", "-c", "8", ready=False)
    stage.until_count("started", 1)
    began = monotonic()
    stage.until_count("done", 400)
    rate = 400 / (monotonic() - began)
    stage.figures["per_second"] = round(rate)
    stage.expect(rate >= 40, f"{rate:.0f} tasks a second with 16 handlers of 0.1 s each")
    stage.drain()
    stage.balance()
    stage.stop_workers()


@network_fault(quick=("rabbitmq",))
def silent_at_the_end(stage: Stage) -> None:
    """TERM while the network is dead: the worker ends within a bounded time, and its messages run elsewhere."""
    worker = stage.worker("-p", "1", "-c", "2")
    stage.publish("m0", ms=300)
    stage.publish("m1", ms=300)
    stage.until_count("started", 2)
    stage.wire.stall()
    stage.until_count("done", 2)
    told_at = monotonic()
    worker.signal(signal.SIGTERM)
    worker.wait(40)
    stage.figures["exit_after"] = round(monotonic() - told_at, 1)
    stage.expect(stage.figures["exit_after"] <= 20, f"it took {stage.figures['exit_after']} s to end")
    stage.workers.remove(worker)
    stage.wire.reset_all()
    stage.wire.heal()
    stage.worker("-p", "1")
    stage.drain(LEASE + 60)
    stage.balance(duplicates=2)
    stage.stop_workers()


@network_fault(quick=("redis",))
def refused_and_unresolved(stage: Stage) -> None:
    """Connections refused, and a host name that does not resolve: told in time, with its reason; no storm of tries."""
    stage.worker("-p", "1")
    stage.wire.refuse()
    host = "nohost.invalid"
    for url in (stage.url, stage.url.replace("127.0.0.1", host)):
        with kq.App("publisher", broker=url, publish_timeout=3.0) as app:
            began = monotonic()
            try:
                app.publish(stage.queue, {"id": "never"})
                stage.expect(False, "a publish succeeded")
            except errors.Internal as error:
                stage.expect(error.details.get("reason") in ("unavailable", "timeout"), f"{url}: {error.details}")
            stage.expect(monotonic() - began <= 3.5, f"{url}: {monotonic() - began:.1f} s")
    stage.wire.reopen()
    open_at = monotonic()
    stage.publish("after", ms=0)
    stage.figures["recovery"] = round(stage.next_start(open_at), 2)
    stage.expect(stage.figures["recovery"] <= 5.0, f"work went on after {stage.figures['recovery']} s")
    stage.drain()
    stage.balance()
    stage.stop_workers()


@network_fault(on=SERVERS)
def silent_in_mid_frame(stage: Stage) -> None:
    """An answer whose end never comes: every call ends at its deadline, nobody spins, and work goes on."""
    worker = stage.worker("-p", "1", "-c", "2")
    stage.finish(stage.load(url=stage.site.url, messages=300, rate=0, ms=20))
    for _ in range(3):
        stage.pause(0.3, 0.8)
        # Half of what is on its way arrives, then nothing: as if cut, but without a word.
        stage.wire.freeze_after(stage.rng.randrange(1, 200))
        stage.pause(0.2)
    began, used = monotonic(), cpu(worker.pid)
    stage.drain()
    seconds = monotonic() - began
    stage.figures["cpu_percent"] = round(100 * (cpu(worker.pid) - used) / max(1.0, seconds))
    stage.expect(stage.figures["cpu_percent"] < 60, f"the supervisor used {stage.figures['cpu_percent']} % CPU")
    stage.balance(duplicates=64)
    stage.stop_workers()


@network_fault(on=("redis",), quick=("redis",))
def away_for_half_a_lease(stage: Stage) -> None:
    """A worker's way to the broker is gone for a good half of a lease, under long tasks: nobody else gets them."""
    lease = 12.0
    stage.environment["KQ_LEASE"] = str(lease)
    stage.worker("-p", "1", "-c", "4")
    load = stage.load(url=stage.site.url, messages=4, rate=0, ms=25_000)
    stage.finish(load)
    stage.until_count("started", 4)
    stage.worker("-p", "1", "-c", "4", url=stage.site.url)
    # Once renewed, so that all leases end at the same moment. Two renewals become due meanwhile; there is time for one.
    stage.pause(lease / 3 + 2.0, lease / 3 + 3.5)
    stage.wire.refuse()
    stage.wire.reset_all()
    stage.pause(0.54 * lease)
    stage.wire.reopen()
    stage.drain()
    stage.balance(duplicates=0)
    stage.stop_workers()
