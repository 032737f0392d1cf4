"""A folder with a configuration file and handlers, and the commands that run there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.broker import Broker
from tests.integration.conftest import PATIENCE, wait_for


class Project:
    """A folder with a configuration file and handlers, and commands that run there."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        self.folder = folder
        self.broker = broker
        self.environment = {**os.environ, "KQ_BROKER_URL": broker.url, "KQ_LEASE": "2"}
        self.workers: list[subprocess.Popen[str]] = []
        self.log_file = folder / "worker.log"

    def write(self, name: str, text: str) -> None:
        """Write a file as a whole: whoever reads it sees the old one or the new one."""
        new = self.folder / (name + ".new")
        new.write_text(text)
        new.replace(self.folder / name)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a ``kq`` command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "kq", *arguments], cwd=self.folder, env={**self.environment, **environment},
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip

    def worker(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a worker and wait until it says so."""
        with self.log_file.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "kq", "worker", *arguments],
                cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True,
            )  # fmt: skip
        self.workers.append(process)
        self.until("kq worker of")
        return process

    def log(self) -> str:
        """Return what the worker has logged so far."""
        return self.log_file.read_text()

    def until(self, text: str, count: int = 1) -> None:
        """Wait until the log says something."""
        wait_for(lambda: self.log().count(text) >= count, f"{count} x {text!r} in the log:\n{self.log()}")

    def main(self) -> str:
        """Return the entry of the project's own broker."""
        return f"  - {{name: broker, kind: queue.driver.sqlite, url: '{self.broker.url}'}}\n"

    def close(self) -> None:
        """End what is left."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
