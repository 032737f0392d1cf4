"""Publishing from event loops: what their tasks hand in goes from the loop itself, or a thread publishes it.

A task hands in its message and awaits. To a broker that can be sent something without waiting it goes from the loop
(`kq.loop_commit`). Anything else is a thread's, which takes whatever has been handed in by then, publishes it through
the `GroupCommit`, which has it share a round trip with what threads publish, and wakes each loop up once, however
many of its tasks have waited. So a loop is never blocked, a lone task pays for two changes of thread at most, and
fifty of them cost little more than one. Where the broker takes its time, a second thread does not wait for the first.
"""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from threading import RLock, Thread, current_thread, get_ident, local
from time import monotonic
from typing import Final
from weakref import WeakValueDictionary

from kq.backend import Publication
from kq.errors import Error, Internal
from kq.group_commit import MAX_GROUP, GroupCommit, length
from kq.loop_commit import LoopCommit, Request, Results, Sender, no_sender
from kq.shield import deferring, strike

#: Seconds without anything to publish after which a thread ends; the next task starts another one.
_QUIET: Final = 10.0


class _Mine(local):
    """What a thread's event loop publishes with."""

    loop: AbstractEventLoop | None = None
    commit: LoopCommit | None = None


class AsyncCommit:
    """Publishes on behalf of tasks, of whatever event loops. Thread-safe.

    Args:
        commit: What threads publish through.
        sender: Returns what event loops send with, as `kq.backend.Backend.send` does; None where nothing does.
    """

    def __init__(self, commit: GroupCommit, sender: Sender = no_sender) -> None:
        self._commit = commit
        self._sender = sender
        self._mine = _Mine()
        #: Of all loops, by identity.
        self._loop_commits = WeakValueDictionary[int, LoopCommit]()
        self._pid = os.getpid()
        # A signal's handler may close it, in a thread that holds it.
        self._lock = RLock()
        #: What waits for a thread; each None ends one. Nothing more comes to it then.
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._threads: list[Thread] = []
        #: How many of them publish, and since when the last of these does.
        self._busy = 0
        self._busy_since = 0.0
        #: Callers' threads that hold the lock, or are about to, or are in the middle of something else here; and those
        #: a signal's handler has it closed in, with how long it waits.
        self._inside: set[int] = set()
        self._interrupted: dict[int, float] = {}

    async def publish(self, batch: Sequence[Publication], timeout: float) -> Results:
        """Publish ``batch`` and return one result for each, ``timeout`` seconds from now at the latest.

        If the task is cancelled before anybody has begun with it, nothing is published.

        Raises:
            Internal: If there is no room for a thread.
        """
        loop = get_running_loop()
        request = Request(batch, monotonic() + timeout, loop)
        # A sync handler's time limit must not strike in here, where it runs a loop of its own.
        self._guard(partial(self._take, request))
        request.arm()
        try:
            # Here it does, also where it was due in the middle of what the loop has done for this.
            strike()
            return await request.future
        finally:
            request.leave()
            strike()

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
        until = monotonic() + patience
        me = get_ident()
        self._inside.add(me)
        try:
            commits = [commit for one in self._loop_commits.valuerefs() if (commit := one()) is not None]
            # Threads publish that, while what is on its way is waited for.
            for commit in commits:
                for request in commit.take_back():
                    self._pass_on(request)
            here = _running_loop()
            for commit in commits:
                commit.wait(here, until)
            with self._lock:
                threads, self._threads, self._busy = self._threads, [], 0
                requests, self._requests = self._requests, SimpleQueue()
                for _ in threads:
                    requests.put(None)
        finally:
            self._leave(me)
        for thread in threads:
            thread.join(max(0.0, until - monotonic()))

    def _leave(self, me: int) -> None:
        self._inside.discard(me)
        if me in self._interrupted:
            self.close(self._interrupted.pop(me))

    def _guard(self, step: Callable[[], None]) -> None:
        """Run a step that no time limit interrupts, and no signal's handler that closes this."""
        if os.getpid() != self._pid:
            # Forked by a task: what is on its way is the parent's business.
            return
        me = get_ident()
        if me in self._inside:
            step()
            return
        try:
            with deferring():
                # First of all: a signal's handler must not wait for a thread that waits for the lock.
                self._inside.add(me)
                step()
        finally:
            self._leave(me)

    def _take(self, request: Request) -> None:
        mine = self._mine
        if mine.commit is not None and mine.loop is request.loop:
            mine.commit.hand_in(request)
        elif self._sender() is None:
            self._pass_on(request)
        else:
            commit = LoopCommit(self._commit, self._sender, self._pass_on, self._guard)
            with self._lock:
                self._loop_commits[id(commit)] = commit
            mine.loop, mine.commit = request.loop, commit
            commit.hand_in(request)

    def _pass_on(self, request: Request) -> None:
        """Have a thread publish what a loop cannot, or has not."""
        try:
            self._hand_in(request)
        except Error as error:
            # Closed: nobody waits there.
            with suppress(RuntimeError):
                request.loop.call_soon_threadsafe(request.tell, error)

    def _hand_in(self, request: Request) -> None:
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


def _running_loop() -> AbstractEventLoop | None:
    try:
        return get_running_loop()
    except RuntimeError:
        return None
