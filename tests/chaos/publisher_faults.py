"""Publishers that are killed, forked, crowded, hurried, and out of descriptors; clocks that are wrong; delays."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import textwrap
from contextlib import closing
from functools import partial
from threading import Thread
from time import monotonic

import kq
from kq import errors
from tests.chaos.process import Program
from tests.chaos.scenario import SERVERS, SHARED, scenario
from tests.chaos.site import RETURN_RETRY
from tests.chaos.stage import ROOT, Stage

publisher_fault = partial(scenario, "publishers")


@publisher_fault(quick=("sqlite", "redis"))
def killed_in_mid_batch(stage: Stage) -> None:
    """A publisher killed while it publishes thousands: what was confirmed is stored, whole, and in order."""
    kills = max(3, stage.size.kills // 2)
    for n in range(kills):
        load = stage.load(messages=10_000, rate=0, many=500, ms=0, prefix=f"p{n}")
        stage.until(lambda n=n: any(i.startswith(f"p{n}-") for i in stage.history.ids("attempted")), "a start")  # type: ignore[misc]
        stage.pause(0.0, 0.4)
        load.kill()
    stage.worker("-p", "1", "-c", "1")
    stage.drain()
    done = stage.history.ids("done")
    stage.expect(not [id for id in done if id.startswith("torn")], "a message is damaged")
    # RabbitMQ puts back what is on its way to a consumer whose window changes, and gives it out again later.
    for n in range(kills if stage.site.kind != "rabbitmq" else 0):
        numbers = [int(id.partition("-")[2]) for id in done if id.startswith(f"p{n}-")]
        stage.expect(numbers == sorted(numbers), f"p{n}: out of order")
    stage.balance()
    stage.stop_workers()


_FORKED = """
    import os, sys
    import kq
    from kq import errors
    from tests.chaos.history import Writer
    url, queue, folder, count = sys.argv[1:4] + [int(sys.argv[4])]
    history = Writer(folder)
    app = kq.App("web", broker=url)
    app.publish(queue, {"id": "parent", "ms": 0}, message_id="parent")
    children = []
    for child in range(8):
        pid = os.fork()
        if not pid:
            for n in range(count):
                id = f"f{child}-{n}"
                history.write("attempted", id)
                try:
                    app.publish(queue, {"id": id, "ms": 0}, message_id=id)
                except errors.Error as error:
                    history.write("rejected", id, 1, str(error))
                else:
                    history.write("acked", id)
            os._exit(0)
        children.append(pid)
    for n in range(count):
        id = f"p-{n}"
        history.write("attempted", id)
        app.publish(queue, {"id": id, "ms": 0}, message_id=id)
        history.write("acked", id)
    sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


@publisher_fault(quick=SHARED)
def forked(stage: Stage) -> None:
    """A web server forks after it has connected, and everybody publishes: all is stored, without an error."""
    stage.note.write("attempted", "parent")
    stage.note.write("acked", "parent")
    count = {"brief": 60, "standard": 200, "full": 500}[stage.size.name]
    command = [sys.executable, "-c", textwrap.dedent(_FORKED), stage.url, stage.queue, str(stage.folder), str(count)]
    program = Program(command, {**os.environ, "PYTHONPATH": str(ROOT)}, stage.folder / "publisher-fork.log", ROOT)
    stage.finish(program)
    stage.expect(stage.history.count("rejected") == 0, f"{stage.history.count('rejected')} errors")
    stage.expect(stage.history.count("acked") == 1 + 9 * count, f"{stage.history.count('acked')} confirmed")
    stage.worker("-p", "2")
    stage.drain()
    stage.balance()
    stage.stop_workers()


@publisher_fault(quick=("redis",))
def sixteen_threads(stage: Stage) -> None:
    """Sixteen threads publish with one app: all is stored, once, without an error."""
    count = {"brief": 50, "standard": 200, "full": 1000}[stage.size.name]
    failures: list[BaseException] = []
    with kq.App("crowd", broker=stage.url) as app:

        def publish(number: int) -> None:
            try:
                for n in range(count):
                    id = f"t{number}-{n}"
                    stage.note.write("attempted", id)
                    app.publish(stage.queue, {"id": id, "ms": 0}, message_id=id)
                    stage.note.write("acked", id)
            except BaseException as error:
                failures.append(error)

        threads = [Thread(target=publish, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stage.expect(not failures, f"{failures[:1]}")
    stage.worker("-p", "2")
    stage.drain()
    stage.balance()
    stage.stop_workers()


async def _publish(stage: Stage, app: kq.App, id: str) -> None:
    """Publish from a task, and note what it is told."""
    stage.note.write("attempted", id)
    try:
        await app.apublish(stage.queue, {"id": id, "ms": 0}, message_id=id)
    except errors.Internal as error:
        stage.note.write("rejected", id, 1, str(error.details.get("reason")))
    else:
        stage.note.write("acked", id)


@publisher_fault(wired=True, on=SERVERS, quick=("rabbitmq",))
def event_loop(stage: Stage) -> None:
    """Coroutines publish while the broker goes silent: the loop never waits, everybody is told in time."""
    late: list[float] = []
    ended: list[float] = []

    async def publish(app: kq.App, n: int) -> None:
        began = monotonic()
        await _publish(stage, app, f"a{n}")
        ended.append(monotonic() - began)

    async def tick() -> None:
        while True:
            began = monotonic()
            await asyncio.sleep(0.01)
            late.append(monotonic() - began - 0.01)

    async def main() -> None:
        with kq.App("loop", broker=stage.url, publish_timeout=2.0) as app:
            ticking = asyncio.create_task(tick())
            await asyncio.gather(*(publish(app, n) for n in range(100)))
            stage.wire.stall()
            await asyncio.gather(*(publish(app, n) for n in range(100, 164)))
            stage.wire.reset_all()
            stage.wire.heal()
            await asyncio.gather(*(publish(app, n) for n in range(200, 300)))
            ticking.cancel()

    asyncio.run(main())
    stage.figures["loop_late"] = round(max(late), 3)
    stage.figures["slowest"] = round(max(ended), 2)
    stage.expect(max(late) < 0.5, f"the loop stood still for {max(late):.2f} s")
    stage.expect(max(ended) <= 2.6, f"a publish with a timeout of 2 s took {max(ended):.1f} s")
    stage.worker("-p", "1", url=stage.site.url)
    stage.drain()
    stage.balance()
    stage.stop_workers()


@publisher_fault(wired=True, on=SERVERS, quick=("redis",))
def fifty_tasks(stage: Stage) -> None:
    """Fifty tasks of a loop publish while connections are cut again and again: what was confirmed is stored."""
    count = {"brief": 40, "standard": 200, "full": 1000}[stage.size.name]
    tasks, cuts = 50, 10
    begun = 0

    async def publish(app: kq.App, number: int) -> None:
        nonlocal begun
        for n in range(count):
            begun += 1
            if begun % (tasks * count // cuts) == 0:
                stage.wire.reset_all()
            await _publish(stage, app, f"t{number}-{n}")

    async def main() -> None:
        with kq.App("tasks", broker=stage.url) as app:
            await asyncio.gather(*(publish(app, number) for number in range(tasks)))

    asyncio.run(main())
    rejected = stage.history.count("rejected")
    stage.figures["rejected"] = rejected
    stage.expect(rejected <= tasks * cuts, f"{rejected} were not confirmed")
    stage.worker("-p", "2", url=stage.site.url)
    stage.drain()
    # RabbitMQ knows nothing of ids: what is published once more, because its confirmation got lost, is there twice.
    stage.balance(duplicates=tasks * cuts if stage.site.kind == "rabbitmq" else 0)
    stage.stop_workers()


@publisher_fault(quick=("sqlite", "rabbitmq"))
def clocks_differ(stage: Stage) -> None:
    """One publisher's clock is an hour ahead, another's behind: nothing is early, late or given out twice for it."""
    stage.worker("-p", "1", "-c", "4")
    command = [sys.executable, "-m", "kq", "publish", stage.queue, "-b", stage.url, "--delay", "3s"]
    began: dict[str, float] = {}
    for id, offset in (("ahead", "3600"), ("behind", "-3600")):
        stage.note.write("attempted", id)
        began[id] = monotonic()
        subprocess.run(
            [*command, "--message-id", id, json.dumps({"id": id, "ms": 0})], check=True, capture_output=True, cwd=ROOT,
            env={**os.environ, "KQ_TEST_CLOCK_OFFSET": offset, "PYTHONPATH": str(ROOT)}, timeout=30,
        )  # fmt: skip
        stage.note.write("acked", id)
    # A worker that starts with a clock that has jumped takes nobody's lease.
    stage.publish("long", ms=2500)
    stage.until(lambda: stage.history.lines("started", "long"), "the long one")
    stage.environment["KQ_TEST_CLOCK_OFFSET"] = "7200"
    stage.worker("-p", "1", "-c", "4")
    stage.drain()
    for id, at in began.items():
        took = stage.history.lines("started", id)[0].at - at
        stage.figures[id] = round(took, 2)
        stage.expect(took >= 2.0, f"the message of the publisher {id} came after {took:.1f} s, its delay is 3 s")
        stage.expect(took <= 6.5, f"the message of the publisher {id} came after {took:.1f} s, its delay is 3 s")
    stage.balance()
    stage.stop_workers()


_POOR = """
    import resource, sys
    import kq
    from kq import errors
    app = kq.App("poor", broker=sys.argv[1], publish_timeout=3.0)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    app.registry.backend()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
    try:
        app.publish(sys.argv[2], {"id": "never"})
    except errors.Internal as error:
        print("told", error.details["reason"])
"""


@publisher_fault(quick=("sqlite",))
def out_of_descriptors(stage: Stage) -> None:
    """A worker and a publisher without a free descriptor: errors are explicit, and with some free all goes on."""
    worker = stage.worker("-p", "1", "-c", "2")
    stage.publish("before", ms=0)
    stage.until_count("done", 1)
    (child,) = worker.children()
    soft, hard = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (3, hard))
    os.kill(child, 9)
    stage.publish("during", ms=0)
    stage.pause(2.0)
    stage.expect(worker.alive, "the worker ended")
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (soft, hard))
    stage.publish("after", ms=0)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_POOR), stage.url, stage.queue], capture_output=True, text=True,
        timeout=30, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    stage.expect(done.stdout.startswith("told"), f"{done.stdout} {done.stderr[-300:]}")
    stage.drain()
    stage.balance(duplicates=1)
    stage.stop_workers()


@publisher_fault(quick=("redis",))
def delays_are_the_brokers(stage: Stage) -> None:
    """Delayed messages, whose workers and broker die before they are due: all come, none early, none late.

    RabbitMQ may send what has expired before it finds the queue again after its start; it tries again later.
    """
    count = {"brief": 100, "standard": 300, "full": 1000}[stage.size.name]
    load = stage.load(messages=count, rate=0, ms=0, delay=[3.0, 9.0])
    stage.finish(load)
    worker = stage.worker("-p", "1")
    stage.pause(1.0)
    worker.kill_tree()
    stage.workers.clear()
    back_at = monotonic()
    if stage.site.kind != "sqlite":
        stage.site.kill()
        stage.site.start()
        back_at = monotonic()
    stage.worker("-p", "1")
    stage.drain()
    acked = {line.id: line.at for line in stage.history.lines("acked")}
    late = []
    for line in stage.history.lines("started"):
        n = int(line.id.rpartition("-")[2])
        delay = 3.0 + 6.0 * n / (count - 1)
        # Confirmed a moment after the delay has begun.
        stage.expect(
            line.at - acked[line.id] >= delay - 0.2, f"{line.id} came {line.at - acked[line.id]:.2f} s after it"
        )
        late.append(line.at - max(acked[line.id] + delay, back_at + 1.0))
    late.sort()
    stage.figures["late_p99"] = round(max(0.0, late[int(len(late) * 0.99)]), 2)
    within = 2.0 + (RETURN_RETRY if stage.site.kind == "rabbitmq" else 0.0)
    stage.expect(stage.figures["late_p99"] <= within, f"late by {stage.figures['late_p99']} s")
    stage.balance()
    stage.stop_workers()


@publisher_fault(quick=("rabbitmq",))
def short_behind_long(stage: Stage) -> None:
    """A delay of a second behind one of an hour comes after a second."""
    stage.worker("-p", "1")
    with closing(kq.App("other", broker=stage.url)) as app:
        app.queue(f"{stage.queue}-long")
        app.publish(f"{stage.queue}-long", {"n": 0}, delay=3600)
    began = monotonic()
    stage.publish("short", delay=1.0, ms=0)
    stage.until(lambda: stage.history.lines("started", "short"), "the short one")
    took = stage.history.lines("started", "short")[0].at - began
    stage.figures["came_after"] = round(took, 2)
    stage.expect(1.0 <= took <= 2.0, f"it came after {took:.1f} s")
    stage.site.forget(f"{stage.queue}-long")
    stage.stop_workers()
