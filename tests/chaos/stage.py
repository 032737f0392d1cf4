"""One run of a scenario: a broker, workers, publishers, a history, and the accounts at the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final, TypeVar
from uuid import uuid4

import kq
from tests.chaos.history import History, Writer
from tests.chaos.ledger import Ledger
from tests.chaos.process import Program, children_of, gone
from tests.chaos.publisher import Order
from tests.chaos.site import Rest, Site
from tests.proxy import Proxy

_T = TypeVar("_T")

ROOT: Final = Path(__file__).parents[2]
#: Seconds of a lease, and between heartbeats, in these runs.
LEASE: Final = 3.0
HEARTBEAT: Final = 2.0
#: Seconds that anything may take before a run is given up.
PATIENCE: Final = 60.0
#: Seconds within which the children of a supervisor that was killed must be gone.
ORPHANS_WITHIN: Final = 2.0


class Broken(AssertionError):
    """A promise without which the run cannot go on."""


@dataclass(frozen=True)
class Size:
    """How much of a scenario is played.

    Attributes:
        name: ``brief`` for the quick selection, ``standard`` for repeats, ``full`` for the catalogue's own figures.
        messages: Messages of a load.
        kills: Faults of a series.
    """

    name: str
    messages: int
    kills: int


SIZES: Final = {
    size.name: size for size in (Size("brief", 600, 4), Size("standard", 2000, 8), Size("full", 10_000, 20))
}


class Stage:
    """One run.

    Args:
        site: A broker that runs.
        seed: What its chances come from.
        size: How much of the scenario to play.
        wired: Whether workers and publishers reach the broker through `wire`.

    Attributes:
        rng: The run's chances.
        queue: The run's queue.
        url: By which workers and publishers reach the broker.
        history: What happened.
        failures: The promises that were broken.
        figures: What was counted and measured.
    """

    def __init__(self, site: Site, *, seed: int, size: Size, wired: bool) -> None:
        self.site = site
        self.size = size
        self.rng = random.Random(seed)
        self.queue = f"chaos{uuid4().hex[:10]}:work"
        self.folder = Path(tempfile.mkdtemp(prefix="kq-chaos-run-"))
        self.history = History(self.folder)
        self.note = Writer(self.folder)
        # A file has no wire.
        self._wire = Proxy(site.url) if wired and site.kind != "sqlite" else None
        self.url = site.url if self._wire is None else self._wire.url
        self.workers: list[Program] = []
        self._others: list[Program] = []
        self.failures: list[str] = []
        self.figures: dict[str, float] = {}
        self.declare: dict[str, Any] = {}
        self.consumer: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self._app: kq.App | None = None
        self._loads = 0
        self._started = 0

    @property
    def wire(self) -> Proxy:
        """The wire between workers and broker."""
        assert self._wire is not None
        return self._wire

    @property
    def app(self) -> kq.App:
        """An app that reaches the broker directly, with the queue declared; of this process."""
        if self._app is None:
            self._app = kq.App("chaos-stage", broker=self.site.url)
            self._app.queue(self.queue, **self.declare)
        return self._app

    # Programs.

    def worker(self, *arguments: str, url: str | None = None, ready: bool = True, **said: Any) -> Program:
        """Start ``kq worker`` and wait until it is at work.

        Args:
            arguments: Of the command.
            url: The broker's, instead of the run's.
            ready: Whether to wait.
            said: More for `tests.chaos.app`.
        """
        words = {
            "queue": self.queue, "history": str(self.folder), "declare": self.declare, "consumer": self.consumer,
            **said,
        }  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "KQ_BROKER_URL": url or self.url,
            "KQ_LEASE": str(LEASE),
            "KQ_HEARTBEAT": str(HEARTBEAT),
            "KQ_TEST_CHAOS": json.dumps(words),
            **self.environment,
        }
        command = [sys.executable, "-m", "kq", "worker", "tests.chaos.app:app", *(arguments or ("-p", "2"))]
        self._started += 1
        log = self.folder / f"worker-{self._started}.log"
        program = Program(command, environment, log, self.folder)
        self.workers.append(program)
        if ready:
            self._until_ready(program)
        return program

    def _until_ready(self, program: Program) -> None:
        self.until(lambda: "kq worker of chaos" in program.log or not program.alive, "a worker's start")
        if not program.alive:
            raise Broken(f"a worker ended at its start:\n{program.log[-2000:]}")

    def load(self, **values: Any) -> Program:
        """Start a publishing process; fields of `Order`, which see."""
        self._loads += 1
        values = {
            "url": self.url, "queue": self.queue, "history": str(self.folder), "prefix": f"m{self._loads}",
            "messages": self.size.messages, "declare": self.declare, **values,
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.chaos.publisher", Order(**values).text()]
        log = self.folder / f"publisher-{self._loads}.log"
        program = Program(command, {**os.environ, "PYTHONPATH": str(ROOT)}, log, self.folder)
        self._others.append(program)
        return program

    def publish(self, id: str, *, delay: float | None = None, **payload: Any) -> None:
        """Publish one message from this process, directly."""
        self.note.write("attempted", id)
        order = Order(self.site.url, self.queue, "")
        for tries in range(5, -1, -1):
            try:
                self.app.publish(self.queue, {**order.payload(id), **payload}, message_id=id, delay=delay)
            except kq.errors.Internal as error:
                # Right after a broker's start it may need a moment.
                self.note.write("rejected", id, 1, f"{error.details.get('reason')} {error.message}")
                if not tries:
                    raise
            else:
                self.note.write("acked", id)
                return

    def finish(self, load: Program, within: float = 3 * PATIENCE) -> None:
        """Wait until a publisher has ended by itself."""
        self.until(lambda: not load.alive, "a publisher's end", within)
        self.expect(load.wait(1) == 0, f"a publisher failed: {load.log[-500:]}")

    def replace(self, worker: Program, *arguments: str) -> Program:
        """See that nothing is left of a worker that was killed, and start another one."""
        index = self.workers.index(worker)
        fresh = self.worker(*arguments, ready=False)
        self.workers.pop(index)
        return fresh

    # Waiting.

    def until(self, what: Callable[[], _T], text: str, within: float = PATIENCE) -> _T:
        """Return the first true answer of ``what``; look often, give up late."""
        until = monotonic() + within
        while True:
            found = what()
            if found:
                return found
            if monotonic() > until:
                raise Broken(f"waited {within:g} s in vain for {text}")
            sleep(0.02)

    def until_count(self, event: str, count: int, within: float = PATIENCE) -> None:
        """Wait until there are so many events of a kind."""
        self.until(lambda: self.history.count(event) >= count, f"{count} x {event}", within)

    def next_start(self, since: float, within: float = PATIENCE, *, unless_over: Program | None = None) -> float:
        """Return the seconds from a moment of the monotonic clock until the next start of a handler.

        Or 0, where a publisher is given, has ended, and all that was stored has been handled: nothing is left to start.
        """

        def found() -> list[float]:
            starts = [line.at - since for line in self.history.lines("started")[-2000:] if line.at > since]
            return starts or ([0.0] if unless_over is not None and is_over(unless_over) else [])

        def is_over(load: Program) -> bool:
            return not load.alive and set(self.history.ids("acked")) <= set(self.history.ids("done"))

        return self.until(found, "a start after the fault", within)[0]

    def pause(self, least: float, most: float | None = None) -> None:
        """Let things run for a while, by chance between two lengths: when a fault strikes is the scenario's choice."""
        sleep(self.rng.uniform(least, least if most is None else most))

    def child(self, worker: Program) -> int:
        """Return one of a worker's children, by chance."""
        return self.rng.choice(self.until(worker.children, "a child"))

    # Accounts.

    def expect(self, holds: object, text: str) -> None:
        """Note a promise that was broken; the run goes on."""
        if not holds:
            self.failures.append(text)

    def drain(self, within: float = PATIENCE) -> None:
        """Wait until everything that was stored has come to an end and the broker holds nothing any more."""
        until = monotonic() + within
        while True:
            missing = set(self.history.ids("acked")) - set(self.history.ids("done"))
            if len(missing) <= 50 and missing.issubset(self._dead()) and self._rest().total == 0:
                return
            if monotonic() > until:
                self.failures.append(
                    f"{len(missing)} messages have not ended after {within:g} s, e.g. {sorted(missing)[:5]}; "
                    f"the broker holds {self._rest()}"
                )
                return
            sleep(0.1)

    def _rest(self) -> Rest:
        return self.site.rest(self.queue)

    def _dead(self) -> Counter[str]:
        return self.site.dead(self.queue)

    def ledger(self) -> Ledger:
        """Return the accounts as they are now."""
        ids = self.history.ids
        return Ledger.of(
            attempted=ids("attempted"), acked=ids("acked"), started=ids("started"), done=ids("done"),
            dead=self._dead().elements(), waiting=self._rest().total,
        )  # fmt: skip

    def balance(self, *, duplicates: int = 0, dead: int | None = 0, both: int = 0) -> Ledger:
        """Draw up the accounts and hold them against what is promised.

        Args:
            duplicates: How many handlers may have finished beyond one for each message.
            dead: How many messages must be dead; None for any number.
            both: How many may be done and dead.
        """
        ledger = self.ledger()
        self.figures.update(
            attempted=len(ledger.attempted), acked=len(ledger.acked), done=len(ledger.done), lost=len(ledger.lost),
            false_confirmations=len(ledger.false_confirmations), duplicated=ledger.duplicated, dead=len(ledger.dead),
            unexpected=len(ledger.unexpected),
        )  # fmt: skip
        self.expect(not ledger.lost, f"lost {len(ledger.lost)}: {sorted(ledger.lost)[:5]}")
        self.expect(not ledger.unexpected, f"{len(ledger.unexpected)} unexpected: {sorted(ledger.unexpected)[:5]}")
        self.expect(ledger.imbalance == 0, f"the accounts do not balance: {ledger.imbalance:+d}")
        self.expect(ledger.duplicated <= duplicates, f"{ledger.duplicated} ran twice, at most {duplicates} may")
        if dead is not None:
            self.expect(len(ledger.dead) == dead, f"{len(ledger.dead)} are dead, not {dead}: {sorted(ledger.dead)[:5]}")
        self.expect(len(ledger.both) <= both, f"{len(ledger.both)} are done and dead: {sorted(ledger.both)[:5]}")
        self.expect(max(ledger.dead.values(), default=1) == 1, "a message died twice")
        return ledger

    def stop_workers(self, code: int = 0) -> None:
        """Tell every worker to stop, and see that it ends as it should and leaves nothing behind."""
        for worker in self.workers:
            self._until_ready(worker)
            worker.signal(signal.SIGTERM)
        for worker in self.workers:
            children = worker.children()
            self.until(lambda worker=worker: not worker.alive, "a worker's end")  # type: ignore[misc]
            self.expect(
                worker.wait(1) == code, f"a worker ended with {worker.wait(1)}, not {code}:\n{worker.log[-500:]}"
            )
            self.expect(gone(children, ORPHANS_WITHIN), "a worker left children behind")
        self.workers.clear()

    def letter(self, id: str) -> Any:
        """Return a dead letter."""
        found: Any = self.app.dead(self.queue).get(id)
        return found

    def logs(self) -> str:
        """Return what all workers have logged."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("worker-*.log")))

    def close(self, keep: bool) -> None:
        """End what is left, and delete the run's files unless they are to be looked at."""
        for program in (*self.workers, *self._others):
            if program.alive:
                children = children_of(program.pid)
                program.signal(signal.SIGCONT)
                program.kill()
                for pid in children:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        if self._app is not None:
            self._app.close()
        if self._wire is not None:
            self._wire.close()
        self.note.close()
        with suppress(Exception):
            self.site.forget(self.queue)
            self.site.empty_buckets()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
