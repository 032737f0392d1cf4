"""Publishing from event loops: what their tasks hand in, one thread publishes, all that waits at once.

A task hands in its message and awaits. The thread takes whatever has been handed in by then, publishes it through
the `GroupCommit`, which has it share a round trip with what threads publish, and wakes each loop up once, however
many of its tasks have waited. So a loop is never blocked, a lone task pays for two changes of thread, and fifty of
them cost little more than one.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future, get_running_loop
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Final

from kq.backend import Publication
from kq.errors import Error, Internal
from kq.group_commit import MAX_GROUP, GroupCommit
from kq.shield import shielded

#: Seconds without anything to publish after which the thread ends; the next task starts another one.
_QUIET: Final = 10.0

Results = list[Error | None]


class _Request:
    """What a task has handed in, and waits for."""

    __slots__ = ("batch", "deadline", "future", "is_over", "is_taken", "loop")

    def __init__(self, batch: Sequence[Publication], deadline: float, loop: AbstractEventLoop) -> None:
        self.batch = batch
        self.deadline = deadline
        self.loop = loop
        self.future: Future[Results] = loop.create_future()
        #: Whether the thread has it; then it may be published.
        self.is_taken = False
        #: Whether nobody waits for it any more.
        self.is_over = False


class AsyncCommit:
    """Publishes through a `GroupCommit` on behalf of tasks, of whatever event loops. Thread-safe."""

    def __init__(self, commit: GroupCommit) -> None:
        self._commit = commit
        self._lock = Lock()
        #: What waits for the thread; None ends it. A thread has one of its own, which nothing more comes to then.
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._thread: Thread | None = None

    async def publish(self, batch: Sequence[Publication], timeout: float) -> Results:
        """Publish ``batch`` and return one result for each, ``timeout`` seconds from now at the latest.

        If the task is cancelled before anybody has begun with it, nothing is published.

        Raises:
            Internal: If there is no room for a thread.
        """
        loop = get_running_loop()
        request = _Request(batch, monotonic() + timeout, loop)
        # A sync handler's time limit must not strike in here, where it runs a loop of its own.
        with shielded():
            self._hand_in(request)
        timer = loop.call_later(timeout, _expire, request)
        try:
            return await request.future
        finally:
            request.is_over = True
            timer.cancel()

    def close(self) -> None:
        """Publish what has been handed in, and end the thread; what is handed in later starts another. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            requests, self._requests = self._requests, SimpleQueue()
            requests.put(None)
        thread.join()

    def _hand_in(self, request: _Request) -> None:
        # In one step with the thread's decision to end.
        with self._lock:
            if self._thread is None:
                thread = Thread(target=self._run, args=(self._requests,), name="kq-publish", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, MemoryError) as error:
                    raise Internal(f"no thread to publish with: {error}", details={"reason": "unavailable"}) from None
                self._thread = thread
            self._requests.put(request)

    def _run(self, requests: SimpleQueue[_Request | None]) -> None:
        request: _Request | None
        while True:
            try:
                request = requests.get(timeout=_QUIET)
            except Empty:
                with self._lock:
                    if requests.empty():
                        self._thread = None
                        return
                continue
            group, size = list[_Request](), 0
            while request is not None:
                # Else nobody waits for it any more, or its loop has been held up and says so when it goes on.
                if not request.is_over and monotonic() < request.deadline:
                    request.is_taken = True
                    group.append(request)
                    size += len(request.batch)
                if size >= MAX_GROUP or requests.empty():
                    break
                request = requests.get()
            if group:
                self._lead(group)
            if request is None:
                return

    def _lead(self, group: list[_Request]) -> None:
        batch = [publication for request in group for publication in request.batch]
        outcome: Results | BaseException
        try:
            # Each of them goes when its own time is over.
            outcome = self._commit.publish(batch, max(request.deadline for request in group) - monotonic())
        except BaseException as error:
            outcome = error
        start = 0
        for loop, requests in groupby(group, lambda request: request.loop):
            told: list[tuple[_Request, Results | BaseException]] = []
            for request in requests:
                end = start + len(request.batch)
                told.append((request, outcome if isinstance(outcome, BaseException) else outcome[start:end]))
                start = end
            # Closed: nobody waits there.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_tell, told)


def _tell(told: list[tuple[_Request, Results | BaseException]]) -> None:
    """Wake the tasks up; on their loop."""
    for request, outcome in told:
        future = request.future
        if future.done():
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _expire(request: _Request) -> None:
    """Tell a task whose time is over; on its loop."""
    if request.future.done():
        return
    request.is_over = True
    text = (
        "the broker did not confirm in time; the message may arrive"
        if request.is_taken
        else "what was handed in before has taken all the time; it was not sent"
    )
    error = Internal(text, details={"reason": "timeout"})
    request.future.set_result([error] * len(request.batch))
