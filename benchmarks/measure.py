"""Measures one contender: a queue of its own, its publisher and its worker as processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import amqp
import psutil
import redis

from benchmarks.contender import Contender
from benchmarks.publish import Order
from benchmarks.tally import Tally
from benchmarks.work import names

ROOT: Final = Path(__file__).parent.parent
#: Seconds without any message after which a worker is given up, and that a program may take to end.
_STALL: Final = 45.0
_END: Final = 15.0
#: Messages by which a publisher has connected and declared what it needs.
_WARM: Final = 5
#: Seconds between two looks at the tally.
_LOOK: Final = 0.005
#: Seconds of quiet that a worker has before it is asked how much memory it takes.
_SETTLE: Final = 1.0


class GivenUp(Exception):
    """A contender did not do what it was measured at; says what it printed."""


class Bench:
    """A contender on a broker, for one repeat. Use it as a context manager; the queue is gone afterwards.

    Args:
        contender: Who is measured.
        url: The broker.
        work: What handlers do: ``noop``, ``cpu``, ``sleep``, ``chain`` or ``fail``.
        style: The kind of handler; the contender's own if empty.
        queues: Over how many queues messages are spread; this and what follows where `Contender.bends`.
        declared: How many queues are declared besides.
        headers: How many headers each message has.
        priorities: Over how many priorities messages are spread.
    """

    def __init__(
        self, contender: Contender, url: str, work: str = "noop", style: str = "", *, queues: int = 1,
        declared: int = 0, headers: int = 0, priorities: int = 1,
    ) -> None:  # fmt: skip
        self._contender = contender
        self._url = url
        self._queue = f"bench{uuid4().hex[:12]}"
        self._names = [*names(self._queue, queues), *names(f"{self._queue}-more", declared)]
        self._folder = Path(tempfile.mkdtemp(prefix="kq-bench-"))
        self._tally = Tally.create(self._folder / "tally")
        self._work = work
        command = contender.pause if work == "sleep" and contender.pause else contender.command
        command = contender.loop if style == "async" and contender.loop else command
        self._command = [sys.executable, *command, *([self._queue] if contender.name == "rq" else [])]
        if contender.name == "rq":
            self._command += ["--url", url]
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BENCH_URL": url,
            "BENCH_QUEUE": self._queue,
            "BENCH_TALLY": str(self._folder / "tally"),
            "BENCH_WORK": work,
            "BENCH_STYLE": style or contender.style,
            "BENCH_QUEUES": str(queues),
            "BENCH_DECLARED": str(declared),
            "BENCH_HEADERS": str(headers),
            "BENCH_PRIORITIES": str(priorities),
            "dramatiq_prom_host": "127.0.0.1",
            **contender.environment,
        }

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tally.close()
        with suppress(OSError, redis.RedisError, amqp.AMQPError):
            _forget(self._url, self._names)
        shutil.rmtree(self._folder, ignore_errors=True)

    def publish(self, order: Order) -> float:
        """Publish, and return how many messages a second that was."""
        with self._publisher(order) as go:
            return order.messages / max(1e-9, go()["seconds"])

    def drain(self, messages: int) -> dict[str, float]:
        """Start a worker on so many messages that wait.

        Returns:
            Its rate, ``drain``, and CPU seconds per 1,000 messages: ``cpu`` of all its processes, ``main`` of those
            that were started, without their children.
        """
        before = self._tally.read().done
        with self._worker() as processes:
            self._wait(before + 1, processes)
            main, every, done = _cpu(processes, alone=True), _cpu(processes), self._tally.read().done
            count = self._wait(before + messages, processes)
            main, every = _cpu(processes, alone=True) - main, _cpu(processes) - every
        handled = max(1, count.done - done)
        return {"drain": count.rate, "cpu": 1000 * every / handled, "main": 1000 * main / handled}

    def idle_memory(self) -> float:
        """Return the PSS of a worker that has handled one message and waits for more, in MiB."""
        with self._worker() as processes:
            self.publish(Order(1))
            self._wait(self._tally.read().done or 1, processes)
            time.sleep(_SETTLE)
            return _memory(processes)

    def start(self) -> float:
        """Return the seconds from the start of a worker's process to the start of the first handler."""
        self.publish(Order(1))
        began = time.monotonic()
        with self._worker() as processes:
            return self._wait(1, processes).first - began

    def first(self) -> float:
        """Return the seconds from the start of a publisher's process to its first message published."""
        # Whatever is declared once for all is declared.
        self.publish(Order(1))
        began = time.monotonic()
        with self._publisher(Order(1)) as go:
            go()
            return time.monotonic() - began

    def lateness(self, delay: float, messages: int) -> dict[str, float]:
        """Return percentiles of the seconds by which delayed messages start late."""
        with self._worker() as processes:
            self.publish(Order(1))
            self._wait(1, processes)
            self.publish(Order(messages, "many", delay=delay, warm=_WARM))
            self._wait(1 + _WARM + messages, processes)
        return _percentiles([sample - delay for sample in self._tally.samples()])

    def endure(self, messages: int, lot: int) -> dict[str, float]:
        """Return the PSS of a worker, in MiB, after a tenth of so many messages and after all of them."""
        with self._worker() as processes:
            early = 0.0
            for published in range(lot, messages + 1, lot):
                self.publish(Order(lot, "many"))
                self._wait(published, processes)
                if not early and published >= messages // 10:
                    early = _memory(processes)
            return {"early": early, "late": _memory(processes)}

    def latency(self, rate: float, messages: int) -> dict[str, float]:
        """Return percentiles of the seconds from publish to the start of the handler, at so many messages a second."""
        with self._worker() as processes:
            self.publish(Order(1))
            self._wait(1, processes)
            with self._publisher(Order(messages, rate=rate, warm=_WARM)) as go:
                go()
            self._wait(1 + _WARM + messages, processes)
        return _percentiles(self._tally.samples())

    @contextmanager
    def _publisher(self, order: Order) -> Iterator[Any]:
        log = (self._folder / "publisher.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.publish", self._contender.module], env=self._environment, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        log.close()
        assert process.stdin is not None
        assert process.stdout is not None
        output = process.stdout

        def line() -> dict[str, Any]:
            # Whatever else a contender prints.
            while text := output.readline():
                if text.startswith("{"):
                    return dict(json.loads(text))
            raise GivenUp(f"the publisher of {self._contender.name} ended:\n{self._log('publisher')}")

        def go() -> dict[str, Any]:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return line()

        try:
            process.stdin.write(order.text() + "\n")
            process.stdin.flush()
            line()
            yield go
        finally:
            with suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            _end([process])

    @contextmanager
    def _worker(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        with (self._folder / "worker.log").open("ab") as log:
            processes = [
                subprocess.Popen(self._command, env=self._environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                             stderr=log, start_new_session=True)
                for _ in range(self._contender.copies)
            ]  # fmt: skip
        try:
            yield processes
        finally:
            _end(processes)

    def _wait(self, done: int, processes: Sequence[subprocess.Popen[Any]]) -> Any:
        last, changed = -1, time.monotonic()
        while True:
            count = self._tally.read()
            if count.done >= done:
                return count
            now = time.monotonic()
            if count.done != last:
                last, changed = count.done, now
            dead = all(process.poll() is not None for process in processes)
            if dead or now > changed + _STALL:
                state = "ended" if dead else f"has done nothing for {_STALL:g} s"
                text = f"the worker of {self._contender.name} {state} after {count.done} of {done} messages"
                raise GivenUp(f"{text}:\n{self._log('worker')}")
            time.sleep(_LOOK)

    def _log(self, name: str) -> str:
        path = self._folder / f"{name}.log"
        return path.read_text(errors="replace")[-1500:] if path.exists() else ""


def _percentiles(samples: Sequence[float]) -> dict[str, float]:
    return {"p50": samples[len(samples) // 2], "p99": samples[min(len(samples) - 1, int(len(samples) * 0.99))]}


def _tree(processes: Sequence[subprocess.Popen[Any]], *, alone: bool = False) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.Error):
            top = psutil.Process(process.pid)
            found += [top] if alone else [top, *top.children(recursive=True)]
    return found


def _cpu(processes: Sequence[subprocess.Popen[Any]], *, alone: bool = False) -> float:
    used = 0.0
    for process in _tree(processes, alone=alone):
        with suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def _memory(processes: Sequence[subprocess.Popen[Any]]) -> float:
    used = 0
    for process in _tree(processes):
        with suppress(psutil.Error):
            used += process.memory_full_info().pss
    return used / 2**20


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    members = _tree(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
    _, alive = psutil.wait_procs([member for member in members if member.is_running()], 1.0)
    for member in alive:
        with suppress(psutil.Error):
            member.kill()
    for process in processes:
        process.wait(_END)


def _forget(url: str, queues: Sequence[str]) -> None:
    """Delete what a contender has left of its queues."""
    if url.startswith("redis"):
        with closing(redis.Redis.from_url(url)) as client:
            for key in list(client.scan_iter(f"*{queues[0].partition('-')[0]}*", count=1000)):
                client.unlink(key)
    elif url.startswith("amqp"):
        parts = urlsplit(url)
        connection = amqp.Connection(
            host=f"{parts.hostname}:{parts.port or 5672}", userid=parts.username or "guest",
            password=parts.password or "guest",
        )  # fmt: skip
        connection.connect()
        with connection:
            channel = connection.channel()
            for queue in queues:
                for name in (queue, f"bench:{queue}", f"bench:{queue}.dead", f"{queue}.DQ", f"{queue}.XQ"):
                    channel.queue_delete(name)
                channel.exchange_delete(f"bench:{queue}.dead")
