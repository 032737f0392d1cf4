"""Where handlers run: what the supervisor knows of processes and threads.

A pool is a few places that take jobs and answer with events. The supervisor is the same above all of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, Protocol

import msgspec

from kq.executor import Job
from kq.outcome import Death, Outcome

#: Seconds beyond its grace that a handler is given where the worker ends.
OVERDUE: Final = 1.0


class Finished(msgspec.Struct, frozen=True):
    """Jobs have ended.

    Attributes:
        place: Where.
        results: Tag and outcome; None where the handler settled the message before.
        early: Whether only the messages are settled, and the handlers run on.
    """

    place: Place
    results: list[tuple[int, Outcome | None]]
    early: bool = False


class Returned(msgspec.Struct, frozen=True):
    """Jobs came back unstarted."""

    place: Place
    tags: list[int]


class Died(msgspec.Struct, frozen=True):
    """A place is gone, and what it held, if anything, with it.

    Attributes:
        place: Which.
        death: How its process ended.
        how: The same, as a verb and what follows it; it says so where its own worker has killed it, and why.
        running: Tags of the jobs that had started.
        queued: Tags of those that had not.
        late: The tags of those that ran past their time limit and did not heed it, where it was killed for that.
        held_up: The tags of those that could not be told so, likewise: they may have been kept from running by another
            one.
    """

    place: Place
    death: Death
    how: str
    running: list[int]
    queued: list[int]
    late: frozenset[int] = frozenset()
    held_up: frozenset[int] = frozenset()


Event = Finished | Returned | Died


@dataclass(eq=False)
class Place:
    """One process, or this one's threads.

    Attributes:
        number: For logs, from 1.
        window: Jobs it may hold: its handlers, and as many more as keep it busy.
        tags: Jobs it holds.
        accepting: Whether it takes new jobs.
        ready: Whether it has loaded the app.
    """

    number: int
    window: int
    tags: set[int] = field(default_factory=set)
    accepting: bool = True
    ready: bool = False

    @property
    def room(self) -> int:
        """How many more jobs it takes now."""
        return max(0, self.window - len(self.tags)) if self.ready and self.accepting else 0


class Pool(Protocol):
    """Places that run jobs.

    Attributes:
        places: Where.
        lock: Held by whoever uses the pool, or anything that is decided by it; `wake` needs no lock.
    """

    places: list[Place]
    lock: Lock

    def start(self) -> None:
        """Make the places; they report when they are ready."""
        ...

    def submit(self, place: Place, jobs: Sequence[Job]) -> None:
        """Give jobs to a place; never blocks."""
        ...

    def poll(self, timeout: float) -> list[Event]:
        """Wait for events at most ``timeout`` seconds, or until `wake`, and return them.

        While it waits the lock is let go.
        """
        ...

    @property
    def needs_watching(self) -> bool:
        """Whether it may have to do something before anything happens, so that a `poll` must end in time."""
        ...

    @property
    def is_stuck(self) -> bool:
        """Whether no place takes anything, and none will soon.

        Several tries in a row to have one have failed, or too many that were killed do not die.
        """
        ...

    def wake(self) -> None:
        """End a `poll`, the present or the next one. Safe in any thread and in signal handlers."""
        ...

    def recall(self) -> None:
        """Ask for what has not started, and start nothing more; `Returned` brings it."""
        ...

    def resume(self) -> None:
        """Take jobs again after `recall`: there is something that runs here or never."""
        ...

    def give_back(self) -> None:
        """Ask for what has not started, and go on; `Returned` brings it, as far as it has not started meanwhile."""
        ...

    def replace(self) -> None:
        """Replace every place by one that has loaded the code anew; each goes when its successor is ready."""
        ...

    def dump(self, name_of: Callable[[int], str]) -> None:
        """Log what runs where, with stacks.

        Args:
            name_of: Returns what people call a job, by its tag.
        """
        ...

    def close(self, patience: float) -> list[Event]:
        """End every place, after ``patience`` seconds by force, and return what was still to come; takes the lock."""
        ...


class StartFailed(Exception):
    """No place can load the app; the text says why."""
