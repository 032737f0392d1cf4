"""One run of one fault against one peer: a Redis of its own, its worker, publishers, and the figures."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from tests.chaos.history import History
from tests.chaos.ledger import Ledger
from tests.chaos.peers.peer import Peer
from tests.chaos.peers.publish import READY
from tests.chaos.process import Program, children_of, gone
from tests.chaos.site import RedisSite, wait_until
from tests.chaos.stage import ROOT
from tests.proxy import Proxy

#: kq's lease and heartbeat, as long as the peers' visibility timeouts.
_LEASE: Final = {"KQ_LEASE": "4", "KQ_HEARTBEAT": "2"}
#: Seconds of rest at the end: at most, and without any change.
_REST: Final = 60.0
_QUIET: Final = 20.0
#: Seconds between two looks.
_LOOK: Final = 0.2
#: Seconds that a program may take to start.
_START: Final = 30.0


class Stage:
    """One run. Use it as a context manager.

    Args:
        peer: Who is tried.
        seed: What its chances come from.
        arguments: More of the command line of Redis.

    Attributes:
        rng: The run's chances.
        site: The run's Redis.
        wire: A wire to it, for who is to have one.
        history: What happened.
        figures: What was counted and measured.
    """

    def __init__(self, peer: Peer, seed: int, *arguments: str) -> None:
        self.peer = peer
        self.rng = random.Random(seed)
        self.queue = peer.queue
        self.folder = Path(tempfile.mkdtemp(prefix="kq-chaos-peer-"))
        self.history = History(self.folder)
        (self.folder / "redis").mkdir()
        self.site = RedisSite(self.folder / "redis", *arguments)
        self.site.start()
        self.wire = Proxy(self.site.url)
        self.figures: dict[str, float] = {}
        self._programs: list[Program] = []
        self._kept: Program | None = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        for program in self._programs:
            if program.alive:
                kill(program)
        self.wire.close()
        self.site.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *arguments: str, url: str | None = None, **more: str) -> Program:
        url = url or self.site.url
        said = {"queue": self.queue, "history": str(self.folder)}
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "KQ_TEST_CHAOS_URL": url,
            "KQ_TEST_CHAOS_QUEUE": self.queue,
            "KQ_TEST_CHAOS_HISTORY": str(self.folder),
            "KQ_BROKER_URL": url,
            "KQ_TEST_CHAOS": json.dumps(said),
            **_LEASE,
            **more,
        }
        log = self.folder / f"{name}-{len(self._programs)}.log"
        program = Program([sys.executable, *arguments], environment, log, self.folder)
        self._programs.append(program)
        return program

    def worker(self, url: str | None = None) -> Program:
        """Start the peer's worker; do not wait."""
        return self._start("worker", *self.peer.command, url=url)

    def keep(self, worker: Program) -> None:
        """From now on, start a new worker whenever this one has ended by itself, as a service manager does."""
        self._kept = worker
        self.figures["restarts"] = 0

    def _tend(self) -> None:
        if self._kept is not None and not self._kept.alive:
            self._kept = self.worker()
            self.figures["restarts"] += 1

    def load(self, prefix: str, *, messages: int, rate: float, pad: int, **more: str) -> Program:
        """Start a publisher, and wait until it is connected."""
        words = (self.peer.name, str(messages), str(rate), prefix, str(pad))
        program = self._start("publisher", "-m", "tests.chaos.peers.publish", *words, **more)
        wait_until(lambda: READY in program.log or not program.alive, "a publisher's start", _START)
        if READY not in program.log:
            raise RuntimeError(f"a publisher ended at its start:\n{program.log[-2000:]}")
        return program

    def finish(self, load: Program) -> None:
        """Wait until a publisher has ended by itself."""
        self._until(lambda: not load.alive, 300.0)
        if load.wait(1):
            raise RuntimeError(f"a publisher failed:\n{load.log[-2000:]}")

    def until_count(self, event: str, count: int, within: float) -> bool:
        """Wait until there are so many events of a kind, and tell whether there are."""
        return self._until(lambda: self.history.count(event) >= count, within)

    def _until(self, what: Callable[[], bool], within: float) -> bool:
        def found() -> bool:
            self._tend()
            return what()

        try:
            wait_until(found, "it", within)
        except AssertionError:
            return False
        return True

    def pause(self, least: float, most: float) -> None:
        """Let things run for a while: when a fault strikes is chance."""
        sleep(self.rng.uniform(least, most))

    def rest(self, quiet: float = _QUIET) -> None:
        """Wait until nothing is left to happen, nothing has happened for a while, or it has taken too long."""
        began = changed = monotonic()
        before: object = None
        while monotonic() < began + _REST:
            held, dead = self._look()
            now = (self.history.count("started"), self.history.count("done"), held, len(dead))
            if now != before:
                before, changed = now, monotonic()
            missing = set(self.history.ids("acked")) - set(self.history.ids("done")) - set(dead)
            if (not missing and not held) or monotonic() > changed + (quiet if missing else _QUIET):
                break
            self._tend()
            sleep(_LOOK)
        self.figures["rest"] = round(monotonic() - began, 1)

    def _look(self) -> tuple[frozenset[str], list[str]]:
        with closing(self.site.client()) as client:
            return self.peer.holds(client, self.queue), self.peer.dead(client, self.queue)

    def balance(self) -> None:
        """Draw up the accounts."""
        held, dead = self._look()
        ids = self.history.ids
        ledger = Ledger.of(
            attempted=ids("attempted"), acked=ids("acked"), started=ids("started"), done=ids("done"), dead=dead,
            waiting=len(held),
        )  # fmt: skip
        self.figures.update(
            attempted=len(ledger.attempted), acked=len(ledger.acked), rejected=len(ids("rejected")),
            done=len(ledger.done), lost=len(ledger.lost - held), stuck=len(ledger.lost & held),
            false_confirmations=len(ledger.false_confirmations - held), duplicated=ledger.duplicated,
            dead=len(ledger.dead), unexpected=len(ledger.unexpected),
        )  # fmt: skip

    def logs(self) -> dict[str, str]:
        """Return the end of what each program printed."""
        return {program.log_file.name: program.log[-1000:] for program in self._programs}


def kill(program: Program) -> None:
    """Kill a program and all that descends from it in one go, as a machine that dies does."""
    pids = [program.pid]
    # Stopped first: what is stopped starts nobody.
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        pids += children_of(pid)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    program.kill()
    gone(pids, 5.0)
