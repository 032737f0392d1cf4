"""``--pool threads``: handlers run in the supervisor's own process.

For platforms without children, for debugging, for ``app.drain()``, and always on ``memory://``. A
handler that takes the process with it takes the worker with it, and one that ignores its time limit
cannot be killed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Lock
from time import monotonic

from kq.executor import Executor, Job
from kq.worker.pool import OVERDUE, Event, Finished, Place, Returned
from kq.worker.runner import Result, Runner
from kq.worker.slot import SlotTable

logger = logging.getLogger("kq.worker")

#: Jobs beyond the running ones that wait in this process, so that handlers find the next one at once.
_AHEAD = 2


class ThreadPool:
    """A pool with one place: this process.

    Args:
        executor: Turns a job into an outcome.
        concurrency: Handlers at once.
        shortest_timeout: Seconds of the shortest time limit of any handler, or None.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        concurrency: int,
        shortest_timeout: float | None,
    ) -> None:
        self._place = Place(1, concurrency * _AHEAD, ready=True)
        self.places: list[Place] = [self._place]
        self.lock = Lock()
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._slots = SlotTable(2 * concurrency)
        self._runner = Runner(
            executor,
            concurrency=concurrency,
            shortest_timeout=shortest_timeout,
            slots=self._slots,
            emit=self._emit,
            on_broken=self._break,
        )
        self._broken: BaseException | None = None

    def start(self) -> None:
        """Do nothing: threads start with their first job."""

    def submit(self, place: Place, jobs: Sequence[Job]) -> None:
        """See `Pool.submit`."""
        place.tags.update(job.tag for job in jobs)
        self._runner.submit(jobs)

    def poll(self, timeout: float) -> list[Event]:
        """See `Pool.poll`."""
        events: list[Event] = []
        if self._broken is not None:
            error, self._broken = self._broken, None
            raise RuntimeError("a thread that runs handlers has broken; what it held is delivered again") from error
        self.lock.release()
        try:
            # Not get(timeout=0): up to Python 3.11 that can wait for ever, on a remainder below zero.
            event = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except Empty:
            return events
        finally:
            self.lock.acquire()
        try:
            while True:
                if event is not None:
                    tags = event.tags if isinstance(event, Returned) else [tag for tag, _ in _results(event)]
                    self._place.tags.difference_update(tags)
                    events.append(event)
                event = self._events.get_nowait()
        except Empty:
            return events

    @property
    def needs_watching(self) -> bool:
        """See `Pool.needs_watching`: threads report by themselves."""
        return False

    @property
    def is_stuck(self) -> bool:
        """See `Pool.is_stuck`: what has no process needs no start."""
        return False

    def wake(self) -> None:
        """See `Pool.wake`."""
        self._events.put(None)

    def recall(self) -> None:
        """See `Pool.recall`."""
        self._place.accepting = False
        self._events.put(Returned(self._place, self._runner.recall()))

    def resume(self) -> None:
        """See `Pool.resume`."""
        self._place.accepting = True

    def give_back(self) -> None:
        """See `Pool.give_back`."""
        self._events.put(Returned(self._place, self._runner.recall()))

    def replace(self) -> None:
        """Say that there is nothing to replace."""
        logger.warning(
            "HUP does nothing with a pool of threads: restart the worker to load new code",
            extra={"action": "reload"},
        )

    def dump(self, name_of: Callable[[int], str]) -> None:
        """See `Pool.dump`."""
        logger.warning("%s", self._runner.dump(), extra={"action": "dump"})

    def close(self, patience: float) -> list[Event]:
        """See `Pool.close`; threads that still run are daemons and end with the process."""
        with self.lock:
            return self._close(patience)

    def _close(self, patience: float) -> list[Event]:
        self._runner.stop()
        events: list[Event] = []
        # Whoever closes has waited for its handlers as long as it meant to.
        until = monotonic() + min(patience, OVERDUE)
        while self._place.tags and monotonic() < until:
            events += self.poll(until - monotonic())
        if not self._place.tags:
            self._slots.close()
        return events

    def _break(self) -> None:
        self._broken = sys.exc_info()[1]
        self.wake()

    def _emit(self, results: list[Result], early: bool) -> None:
        self._events.put(Finished(self._place, results, early))


def _results(event: Event) -> list[Result]:
    return event.results if isinstance(event, Finished) and not event.early else []
