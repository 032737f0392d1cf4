"""Publishing from event loops: what their tasks hand in goes from the loop itself, or a thread publishes it.

A task hands in its message and awaits. To a broker that can be sent something without waiting it goes from the loop
(`kq.loop_commit`); anything else is a thread's (`kq.commit_threads`). So a loop is never blocked.
"""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock, get_ident, local
from time import monotonic
from weakref import WeakValueDictionary

from kq.async_request import Request, Results
from kq.backend import Publication
from kq.commit_threads import CommitThreads
from kq.group_commit import GroupCommit
from kq.loop_commit import LoopCommit, Sender
from kq.shield import deferring, strike


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

    def __init__(self, commit: GroupCommit, sender: Sender) -> None:
        self._commit = commit
        self._threads = CommitThreads(commit)
        self._sender = sender
        self._mine = _Mine()
        #: Of all loops, by identity.
        self._loop_commits = WeakValueDictionary[int, LoopCommit]()
        self._pid = os.getpid()
        # A signal's handler may close it, in a thread that holds it.
        self._lock = RLock()
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
                    self._threads.hand_in(request)
            here = _running_loop()
            for commit in commits:
                commit.wait(here, until)
            ended = self._threads.end()
        finally:
            self._leave(me)
        for thread in ended:
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
            self._threads.hand_in(request)
        else:
            commit = LoopCommit(self._commit, self._sender, self._threads.hand_in, self._guard)
            with self._lock:
                self._loop_commits[id(commit)] = commit
            mine.loop, mine.commit = request.loop, commit
            commit.hand_in(request)


def _running_loop() -> AbstractEventLoop | None:
    try:
        return get_running_loop()
    except RuntimeError:
        return None
