from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from kq.envelope import Envelope, pack
from kq.executor import Job
from kq.worker import frame
from kq.worker.slot import SlotTable
from kq.worker.wire_queue import CAN_SHARE

PATIENCE = 30.0
CONCURRENCY = 2

APP = """
import fcntl
from pathlib import Path
import kq

app = kq.App("child", broker="memory://")
GATE = Path(__file__).with_name("gate")

@app.consumer("app:a")
def handle(what):
    if what == "wait":
        # By which everybody knows that it runs.
        kq.queue.message().ack()
        with GATE.open() as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
"""
CHILD = """
import socket, sys
from kq.worker.child import Child
from kq.worker.slot import SlotTable

connection, slots, count, shared = map(int, sys.argv[1:])
sys.exit(Child(socket.socket(fileno=connection), SlotTable(count, slots), shared=bool(shared)).run())
"""

pytestmark = pytest.mark.parametrize(
    "shared",
    [False, pytest.param(True, marks=pytest.mark.skipif(not CAN_SHARE, reason="this system cannot share a wire"))],
)


class Supervisor:
    """Speaks with a child."""

    def __init__(self, end: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.end = end
        self.process = process
        self.reader = frame.in_supervisor()
        self.heard: list[Any] = []

    def say(self, message: frame.ToChild) -> None:
        """Send a frame."""
        self.end.sendall(frame.encode(message))

    def hear(self) -> Any:
        """Return the next frame."""
        while not self.heard:
            data = self.end.recv(frame.READ_SIZE)
            assert data, "the child has ended"
            self.heard += self.reader.feed(data)
        return self.heard.pop(0)


@contextmanager
def child(folder: Path, shared: bool) -> Iterator[Supervisor]:
    """A child that has loaded the app."""
    (folder / "child_app.py").write_text(APP)
    ours, theirs = socket.socketpair()
    slots = SlotTable(2 * CONCURRENCY)
    numbers = map(str, (theirs.fileno(), slots.fd, slots.count, int(shared)))
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *numbers], pass_fds=(theirs.fileno(), slots.fd),
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.getcwd()}"},
    )  # fmt: skip
    theirs.close()
    ours.settimeout(PATIENCE)
    try:
        supervisor = Supervisor(ours, process)
        supervisor.say(frame.Hello("child_app:app", {}, ["app:a"], CONCURRENCY, "info", "text"))
        assert isinstance(supervisor.hear(), frame.Ready)
        yield supervisor
    finally:
        process.kill()
        process.wait()
        ours.close()
        slots.close()


@contextmanager
def shut(folder: Path) -> Iterator[IO[str]]:
    """The gate, which is open once this gives up its lock."""
    with (folder / "gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield gate


def job(tag: int, what: str) -> Job:
    """A job whose handler waits until the gate is opened, or does nothing."""
    raw = pack(Envelope(str(tag), {"x_kq": 1}, {"content_type": "application/json"}, f'"{what}"'.encode()))
    return Job(tag, "app:a", str(tag), raw)


def done(supervisor: Supervisor, count: int) -> set[int]:
    """Return the tags of so many jobs that are said to be done."""
    tags: set[int] = set()
    while len(tags) < count:
        results = supervisor.hear()
        assert isinstance(results, frame.Results)
        assert not results.others
        tags.update(results.done)
    return tags


def test_jobs_run_and_are_reported(tmp_path: Path, shared: bool) -> None:
    """One at a time, and many in one frame; told that this is all, the child ends."""
    with child(tmp_path, shared) as supervisor:
        for tag in range(1, 20):
            supervisor.say(frame.Work([job(tag, "go")]))
            assert done(supervisor, 1) == {tag}
        supervisor.say(frame.Work([job(tag, "go") for tag in range(100, 400)]))
        assert done(supervisor, 300) == set(range(100, 400))
        supervisor.say(frame.Recall(final=True))
        assert supervisor.hear() == frame.Returned([])
        assert supervisor.process.wait(PATIENCE) == 0


def test_what_waits_comes_back_while_all_threads_run(tmp_path: Path, shared: bool) -> None:
    """And what runs is finished before the child ends."""
    with shut(tmp_path) as gate, child(tmp_path, shared) as supervisor:
        supervisor.say(frame.Work([job(1, "wait"), job(2, "wait")]))
        begun = [supervisor.hear(), supervisor.hear()]
        assert sorted(results.done for results in begun) == [[1], [2]]
        assert all(results.early for results in begun)
        supervisor.say(frame.Work([job(3, "go"), job(4, "go")]))
        supervisor.say(frame.Recall())
        assert supervisor.hear() == frame.Returned([3, 4])
        supervisor.say(frame.Recall(final=True))
        assert supervisor.hear() == frame.Returned([])
        fcntl.flock(gate, fcntl.LOCK_UN)
        ended = [supervisor.hear()]
        while sum(len(results.others) for results in ended) < CONCURRENCY:
            ended.append(supervisor.hear())
        assert sorted(other for results in ended for other in results.others) == [(1, None), (2, None)]
        assert supervisor.process.wait(PATIENCE) == 0


def test_without_its_supervisor_it_ends(tmp_path: Path, shared: bool) -> None:
    """Whatever runs: it will be delivered again."""
    with shut(tmp_path), child(tmp_path, shared) as supervisor:
        supervisor.say(frame.Work([job(1, "wait")]))
        assert supervisor.hear().early
        supervisor.end.shutdown(socket.SHUT_WR)
        assert supervisor.process.wait(PATIENCE) == 1


def test_what_is_no_frame_ends_it(tmp_path: Path, shared: bool) -> None:
    """Nothing can be told it any more."""
    with child(tmp_path, shared) as supervisor:
        supervisor.end.sendall(b"\x01\x00\x00\x00\xc1")
        assert supervisor.process.wait(PATIENCE) == 1
