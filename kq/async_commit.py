"""Publishing from event loops: what their tasks hand in, a thread publishes, all that waits at once.

A task hands in its message and awaits. The thread takes whatever has been handed in by then, publishes it through
the `GroupCommit`, which has it share a round trip with what threads publish, and wakes each loop up once, however
many of its tasks have waited. So a loop is never blocked, a lone task pays for two changes of thread, and fifty of
them cost little more than one. Where the broker takes its time, a second thread does not wait for the first.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future, get_running_loop
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from queue import Empty, SimpleQueue
from threading import RLock, Thread, current_thread, get_ident
from time import monotonic
from typing import Final

from kq.backend import Publication
from kq.errors import Error, Internal
from kq.group_commit import MAX_GROUP, GroupCommit, late, length
from kq.shield import shielded

#: Seconds without anything to publish after which a thread ends; the next task starts another one.
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
        #: Whether a thread has it; then it may be published.
        self.is_taken = False
        #: Whether nobody waits for it any more.
        self.is_over = False


class AsyncCommit:
    """Publishes through a `GroupCommit` on behalf of tasks, of whatever event loops. Thread-safe."""

    def __init__(self, commit: GroupCommit) -> None:
        self._commit = commit
        # A signal's handler may close it, in a thread that holds it.
        self._lock = RLock()
        #: What waits for a thread; each None ends one. Nothing more comes to it then.
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._threads: list[Thread] = []
        #: How many of them publish, and since when the last of these does.
        self._busy = 0
        self._busy_since = 0.0
        #: Callers' threads that hold the lock, or are about to; and those a signal's handler has it closed in, with
        #: how long it waits.
        self._inside: set[int] = set()
        self._interrupted: dict[int, float] = {}

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

    def close(self, patience: float) -> None:
        """Publish what has been handed in, and end the threads; what is handed in later starts another. Idempotent.

        In a signal's handler that interrupts somebody who hands something in, it is done when that is done.

        Args:
            patience: Seconds to wait for what is being published: that may wait in turn for what a signal's handler
                has interrupted, which calls this.
        """
        if get_ident() in self._inside:
            self._interrupted[get_ident()] = patience
            return
        me = get_ident()
        self._inside.add(me)
        try:
            with self._lock:
                threads, self._threads, self._busy = self._threads, [], 0
                requests, self._requests = self._requests, SimpleQueue()
                for _ in threads:
                    requests.put(None)
        finally:
            self._leave(me)
        until = monotonic() + patience
        for thread in threads:
            thread.join(max(0.0, until - monotonic()))

    def _leave(self, me: int) -> None:
        self._inside.discard(me)
        if me in self._interrupted:
            self.close(self._interrupted.pop(me))

    def _hand_in(self, request: _Request) -> None:
        me = get_ident()
        # First of all: a signal's handler must not wait for a thread that waits for the lock.
        self._inside.add(me)
        try:
            # In one step with a thread's decision to end.
            with self._lock:
                if not self._threads:
                    self._start_first()
                elif self._busy == len(self._threads) and length(monotonic() - self._busy_since, 0) > 1:
                    self._start_another()
                self._requests.put(request)
        finally:
            self._leave(me)

    def _start_first(self) -> None:
        try:
            self._start()
        except (RuntimeError, MemoryError) as error:
            raise Internal(f"no thread to publish with: {error}", details={"reason": "unavailable"}) from None

    def _start(self) -> None:
        thread = Thread(target=self._run, args=(self._requests,), name="kq-publish", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _start_another(self) -> None:
        if len(self._threads) < self._commit.width:
            # Without room for it, things go on as before.
            with suppress(RuntimeError, MemoryError):
                self._start()

    def _run(self, requests: SimpleQueue[_Request | None]) -> None:
        request: _Request | None
        while True:
            try:
                request = requests.get(timeout=_QUIET)
            except Empty:
                with self._lock:
                    # Else it has just been handed something, or a None that ends it.
                    if requests is self._requests and requests.empty():
                        self._threads.remove(current_thread())
                        return
                continue
            group, size = list[_Request](), 0
            while request is not None:
                # Said first: whose time is over in this moment is told that it may be sent.
                request.is_taken = True
                # Else nobody waits for it any more, or its loop has been held up and says so when it goes on.
                if request.is_over or monotonic() >= request.deadline:
                    request.is_taken = False
                else:
                    group.append(request)
                    size += len(request.batch)
                if size >= MAX_GROUP or requests.empty():
                    break
                try:
                    request = requests.get_nowait()
                except Empty:
                    break
            if group and not self._publish(group, size, requests):
                return
            if request is None:
                return

    def _publish(self, group: list[_Request], size: int, requests: SimpleQueue[_Request | None]) -> bool:
        """Publish a group, and tell whether this thread is needed any more."""
        began = monotonic()
        with self._lock:
            if requests is self._requests:
                self._busy += 1
                self._busy_since = began
        self._lead(group)
        is_long = length(monotonic() - began, size) > 1
        with self._lock:
            if requests is self._requests:
                if is_long and not requests.empty() and self._busy == len(self._threads):
                    self._start_another()
                self._busy -= 1
                if not is_long and len(self._threads) - self._busy > 1:
                    self._threads.remove(current_thread())
                    return False
        return True

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
    request.future.set_result([late(is_taken=request.is_taken)] * len(request.batch))
