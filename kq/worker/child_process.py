"""The supervisor's end of one child: what goes to it and comes from it, and what is known of its pace."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from kq.executor import Job
from kq.outcome import Death
from kq.worker import frame
from kq.worker.pool import Place
from kq.worker.process import Process


@dataclass(eq=False)
class ChildProcess(Place):
    """A child: a process that loads the app and runs its handlers."""

    process: Process = field(kw_only=True)
    hello: frame.Hello = field(kw_only=True)
    window_min: int = field(kw_only=True)
    why_failed: str = ""
    leaving: bool = False
    outdated: bool = False
    ended: bool = False
    watched: bool = True
    #: Whom it has been killed for; see `Died`.
    late: frozenset[int] = frozenset()
    held_up: frozenset[int] = frozenset()
    #: Why its worker has killed it; empty where it has not.
    killed_because: str = ""
    #: When it is killed, if it has not ended by then; None for never.
    doomed_at: float | None = None
    finished: int = 0
    served: int = 0
    heard_at: float = field(default_factory=monotonic)
    measured_at: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self.slots = self.process.slots
        self.socket = self.process.socket
        self.reader = frame.in_supervisor()
        self.outgoing: deque[memoryview] = deque()
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

    @property
    def is_killed(self) -> bool:
        """Whether its worker has killed it; it may be a while until it is gone."""
        return bool(self.killed_because)

    def kill(self, why: str) -> None:
        """Kill it, and give it nothing more; ``why`` is for people, who are not to take it for a stranger's doing."""
        # A second reason is why it has not ended for the first one.
        self.killed_because = self.killed_because or why
        self.accepting = False
        # Another one takes its place at once: it may be a while until it is gone.
        self.outdated = self.outdated or self.ready
        self.process.kill()

    def how_it_ended(self, death: Death) -> str:
        """Return how it has ended, as a verb and what follows it."""
        if self.killed_because and death.exit_signal == signal.SIGKILL:
            return f"was killed by its worker ({self.killed_because})"
        return str(death)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand over jobs."""
        if not self.tags:
            # Until now there was nothing to be heard of.
            self.heard_at = monotonic()
        self.tags.update(job.tag for job in jobs)
        self.outgoing.extend(map(memoryview, frame.work(jobs)))
        self.write()

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
            frames += self.reader.feed(data)
            if len(data) < frame.READ_SIZE:
                break
        return frames
