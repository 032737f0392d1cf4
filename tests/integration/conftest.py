"""Workers as real processes, watched from the outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

import kq
from tests.broker import Broker

#: Seconds that anything may take before a test gives up on it.
PATIENCE = 30.0
#: Seconds of a lease in these tests.
LEASE = 2.0


def wait_for(what: Callable[[], Any], message: str, within: float = PATIENCE) -> Any:
    """Return the first true answer of ``what``; look often, give up late."""
    until = monotonic() + within
    while monotonic() < until:
        found = what()
        if found:
            return found
        sleep(0.02)
    raise AssertionError(f"waited {within:g} s in vain for {message}")


class Shop:
    """An app in a folder of its own, its broker, its workers and their history."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        self.queue = broker.queue_id("work")
        broker.used += [self.queue + suffix for suffix in ("-limited", "-async", "-async-limited", "-once")]
        self.history_file = folder / "history"
        self.history_file.touch()
        shutil.copy(Path(__file__).with_name("shop.py"), folder / "shop.py")
        self.environment = {
            **os.environ,
            "KQ_BROKER_URL": broker.url,
            "KQ_LEASE": str(LEASE),
            "KQ_TEST_QUEUE": self.queue,
            "KQ_TEST_HISTORY": str(self.history_file),
        }
        self.workers: list[subprocess.Popen[str]] = []
        self.app = kq.App("publisher", broker=broker.url)

    def worker(self, *arguments: str, app: str = "shop:app", ready: bool = True) -> subprocess.Popen[str]:
        """Start ``kq worker`` and wait until it says that it has started."""
        log = self.log_of(len(self.workers))
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "kq", "worker", app, *arguments],
                cwd=self.folder, env=self.environment, stdout=stderr, stderr=stderr, text=True,
            )  # fmt: skip
        self.workers.append(process)
        if ready:
            wait_for(lambda: "kq worker of shop" in log.read_text() or process.poll() is not None, "the worker's start")
            assert process.poll() is None, log.read_text()
        return process

    def log_of(self, number: int) -> Path:
        """Return a worker's log."""
        return self.folder / f"worker-{number}.log"

    def log(self, number: int = 0) -> str:
        """Return what a worker has logged so far."""
        return self.log_of(number).read_text()

    def run(self, *arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run another ``kq`` command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "kq", *arguments],
            cwd=self.folder, env={**self.environment, **environment}, input=stdin, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip

    def history(self, event: str | None = None, n: Any = None) -> list[dict[str, Any]]:
        """Return what handlers wrote down."""
        lines = [json.loads(line) for line in self.history_file.read_text().splitlines()]
        return [
            line for line in lines
            if (event is None or line["event"] == event) and (n is None or line["n"] == n)
        ]  # fmt: skip

    def until(self, event: str, count: int = 1, n: Any = None, within: float = PATIENCE) -> list[dict[str, Any]]:
        """Wait until handlers have written ``count`` such lines, and return them."""
        wait_for(lambda: len(self.history(event, n)) >= count, f"{count} x {event} {n}\n{self.log()}", within)
        return self.history(event, n)

    def children(self, worker: subprocess.Popen[str]) -> list[int]:
        """Return the process ids of a worker's children."""
        return children_of(worker.pid)

    def stop(self, worker: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
        """Stop a worker, and return its exit code."""
        worker.send_signal(number)
        return worker.wait(PATIENCE)

    def close(self) -> None:
        """End what is left."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        self.app.close()


def children_of(pid: int) -> list[int]:
    """Return the process ids of the children of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def command_line(pid: int) -> str:
    """Return what the system shows as a process's command line; nothing where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that is dead but not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def shop(shared_broker: Broker, tmp_path: Path) -> Iterator[Shop]:
    """The shop on every broker that processes can share, in turn."""
    made = Shop(shared_broker, tmp_path)
    yield made
    made.close()


@pytest.fixture
def local_shop(tmp_path: Path) -> Iterator[Shop]:
    """The shop on SQLite, for what does not depend on the broker."""
    made = Shop(Broker("sqlite", f"sqlite:///{tmp_path / 'kq.db'}"), tmp_path)
    yield made
    made.close()
