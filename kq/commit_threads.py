"""Threads that publish what tasks have handed in and their loops cannot send themselves.

A thread takes whatever there is by then, publishes it through the `GroupCommit`, which has it share a round trip with
what threads publish, and wakes each loop up once, however many of its tasks have waited. So a lone task pays for two
changes of thread at most, and fifty of them cost little more than one. Where the broker takes its time, a second thread
does not wait for the first.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import groupby
from queue import Empty, SimpleQueue
from threading import RLock, Thread, current_thread
from time import monotonic
from typing import Final

from kq.async_request import Request, Results
from kq.errors import Error, Internal
from kq.group_commit import MAX_GROUP, GroupCommit, length
from kq.shield import deferring

#: Seconds without anything to publish after which a thread ends; the next request starts another one.
_QUIET: Final = 10.0


class CommitThreads:
    """Publishes requests of whatever event loops. Thread-safe.

    Args:
        commit: What it publishes through.
    """

    def __init__(self, commit: GroupCommit) -> None:
        self._commit = commit
        # A signal's handler may end them, in a thread that holds it.
        self._lock = RLock()
        #: What waits for a thread; each None ends one. Nothing more comes to it then.
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._threads: list[Thread] = []
        #: How many of them publish, and since when the last of these does.
        self._busy = 0
        self._busy_since = 0.0

    def __len__(self) -> int:
        return len(self._threads)

    def end(self) -> list[Thread]:
        """Have all of them end once they have published what there is, and return them; the next request starts one."""
        with self._lock:
            threads, self._threads, self._busy = self._threads, [], 0
            requests, self._requests = self._requests, SimpleQueue()
            for _ in threads:
                requests.put(None)
        return threads

    def hand_in(self, request: Request) -> None:
        """Have a thread publish a request; where there is no room for one, its task is told so."""
        try:
            self._put(request)
        except Error as error:
            # Closed: nobody waits there.
            with suppress(RuntimeError):
                request.loop.call_soon_threadsafe(request.tell, error)

    def _put(self, request: Request) -> None:
        # In one step with a thread's decision to end.
        with self._lock:
            if not self._threads:
                self._start_first()
            elif self._busy == len(self._threads) and length(monotonic() - self._busy_since, 0) > 1:
                self._start_another()
            self._requests.put(request)

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

    def _run(self, requests: SimpleQueue[Request | None]) -> None:
        request: Request | None
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
            group, size = list[Request](), 0
            while request is not None:
                # Said first: whose time is over in this moment is told that it may be sent.
                was_taken, request.is_taken = request.is_taken, True
                # Else nobody waits for it any more, or its loop has been held up and says so when it goes on.
                if request.is_over or monotonic() >= request.deadline:
                    request.is_taken = was_taken
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

    def _publish(self, group: list[Request], size: int, requests: SimpleQueue[Request | None]) -> bool:
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

    def _lead(self, group: list[Request]) -> None:
        batch = [publication for request in group for publication in request.batch]
        outcome: Results | BaseException
        try:
            # Each of them goes when its own time is over.
            outcome = self._commit.publish(batch, max(request.deadline for request in group) - monotonic())
        except BaseException as error:
            outcome = error
        start = 0
        for loop, requests in groupby(group, lambda request: request.loop):
            told: list[tuple[Request, Results | BaseException]] = []
            for request in requests:
                end = start + len(request.batch)
                told.append((request, outcome if isinstance(outcome, BaseException) else outcome[start:end]))
                start = end
            # Closed: nobody waits there.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_tell, told)


def _tell(told: list[tuple[Request, Results | BaseException]]) -> None:
    """Wake the tasks up; on their loop."""
    with deferring():
        for request, outcome in told:
            request.tell(outcome)
