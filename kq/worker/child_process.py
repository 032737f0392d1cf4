"""The supervisor's end of one child: its process, its socket, its slots."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from kq.executor import Job
from kq.outcome import Death
from kq.worker import frame
from kq.worker.pool import Place
from kq.worker.slot import SlotTable

#: Bytes that the system is to hold of what a child has not read yet; it may allow less.
_SEND_BUFFER = 1 << 20


@dataclass(eq=False)
class ChildProcess(Place):
    """A child: a fresh interpreter that has loaded the app.

    Not forked but started anew: nothing of the supervisor's connections, locks and threads is in it, and
    a replaced child has loaded the code as it is now.
    """

    hello: frame.Hello = field(kw_only=True)
    window_min: int = field(kw_only=True)
    process: subprocess.Popen[bytes] = field(init=False)
    death: Death | None = None
    why_failed: str = ""
    leaving: bool = False
    outdated: bool = False
    ended: bool = False
    watched: bool = True
    late: frozenset[int] = frozenset()
    #: When it is killed, if it has not ended by then; None for never.
    doomed_at: float | None = None
    finished: int = 0
    served: int = 0
    heard_at: float = field(default_factory=monotonic)
    measured_at: float = field(default_factory=monotonic)

    def start(self) -> None:
        """Start the process and tell it what to load."""
        ours, theirs = socket.socketpair()
        self.slots = SlotTable(2 * self.hello.concurrency)
        numbers = (theirs.fileno(), self.slots.fd, self.slots.count, os.getpid())
        command = [sys.executable, "-m", "kq.worker.child", *map(str, numbers)]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(), self.slots.fd),
                    stdin=subprocess.DEVNULL,
                    # A session of its own: the terminal's Ctrl-C is the supervisor's, and one kill
                    # reaches whatever a handler has started.
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            self.slots.close()
            raise
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.socket = ours
        self.reader = frame.Reader()
        self.outgoing: deque[memoryview] = deque()
        self.pid_fd = _pid_fd(self.process.pid)
        self.send(self.hello)

    def send(self, message: frame.ToChild) -> None:
        """Queue a frame and write what the socket takes; the rest goes when it is writable."""
        self.outgoing.append(memoryview(frame.encode(message)))
        self.write()

    def write(self) -> None:
        """Write as much as the socket takes."""
        while self.outgoing:
            first = self.outgoing[0]
            try:
                sent = self.socket.send(first)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                # It died; waiting for the process says so.
                self.outgoing.clear()
                return
            if sent == len(first):
                self.outgoing.popleft()
            else:
                self.outgoing[0] = first[sent:]

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand over jobs."""
        self.tags.update(job.tag for job in jobs)
        for part in frame.parts(jobs):
            self.send(frame.Work(part))

    def read(self) -> list[Any]:
        """Return the frames that have arrived."""
        frames: list[Any] = []
        while True:
            try:
                data = self.socket.recv(frame.READ_SIZE)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.ended = True
                break
            if not data:
                self.ended = True
                break
            frames += [frame.from_child.decode(raw) for raw in self.reader.feed(data)]
            if len(data) < frame.READ_SIZE:
                break
        return frames

    def kill(self) -> None:
        """Kill it and everything it started; the end is noticed as any other."""
        if self.death is not None:
            # Its number may be somebody else's by now.
            return
        for send in (os.killpg, os.kill):
            # Not Popen.kill, which would take its exit status before `reap` sees it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.process.pid, signal.SIGKILL)

    def reap(self, *, wait: bool = False) -> Death | None:
        """Return how the process ended, or None while it runs.

        Args:
            wait: Whether to wait for its end.
        """
        if self.death is None:
            # Not Popen.poll: only here does the kernel say how much memory it has used.
            try:
                pid, status, usage = os.wait4(self.process.pid, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                # Somebody else in this process has taken its exit status.
                self.death = Death()
                return self.death
            if pid:
                code = self.process.returncode = os.waitstatus_to_exitcode(status)
                peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                self.death = Death(exit_signal=-code, peak_memory=peak) if code < 0 else Death(code, peak_memory=peak)
        return self.death

    def close(self) -> None:
        """Give up what is left of a dead child."""
        # Its group may outlive it: a handler's own processes end with their child.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.socket.close()
        self.slots.close()
        if self.pid_fd is not None:
            os.close(self.pid_fd)
            self.pid_fd = None


def _pid_fd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends, where the system has such a thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
