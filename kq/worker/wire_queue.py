"""Jobs that come over a wire, read by whichever of the threads that are to run them has nothing to do.

It runs itself what it has read. Others wait at the wire already, so none of them has to be woken up for a single job:
the leader/followers pattern (D. C. Schmidt et al., https://www.dre.vanderbilt.edu/~schmidt/PDF/lf.pdf).
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any, Final, NoReturn, Protocol

from kq.worker.job_queue import JobQueue

#: Taken here, before the app is loaded: gevent takes it out of `select`.
_Epoll: Final[Any] = getattr(select, "epoll", None)
#: Whether the system can have several threads wait for a wire and for each other at the same time.
CAN_SHARE: Final = _Epoll is not None and hasattr(os, "eventfd")


class Wire(Protocol):
    """Where jobs come from."""

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        ...

    def read(self) -> bool:
        """Take what has arrived, and tell whether more may come; it must not raise. One call at a time."""
        ...

    def fail(self) -> NoReturn:
        """End the process: it cannot be waited for, because of the exception that is being handled."""
        ...


class WireQueue(JobQueue):
    """A queue whose threads read a wire when they have nothing to do.

    There is one more than run something, so that one always can.

    Args:
        concurrency: Jobs that run at once.
        start: Starts a thread that calls `take` until there is nothing more; raises ``RuntimeError`` if it cannot.
        before_wait: Called by a thread before it waits.
        wire: Where the jobs come from; its `read` is to `put` them here.
    """

    _spare = 1

    def __init__(
        self, concurrency: int, start: Callable[[], None], before_wait: Callable[[], None], wire: Wire
    ) -> None:
        super().__init__(concurrency, start, before_wait)
        self._wire = wire
        self._wire_fd = wire.fileno()
        self._rings = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        #: Whoever is told of the wire has it to himself until this is said again.
        self._once = select.EPOLLIN | select.EPOLLONESHOT
        self._poll = _Epoll()
        self._poll.register(self._rings, select.EPOLLIN)

    def open(self) -> None:
        """Begin to read.

        Raises:
            RuntimeError: If not even one thread can be started.
        """
        self._poll.register(self._wire_fd, self._once)
        self.put(())

    def _ring(self, number: int) -> None:
        os.eventfd_write(self._rings, number)

    def _wait(self) -> int:
        try:
            # Whoever has waited for the shortest time is woken: one and the same thread, as long as one is enough.
            ((fd, _),) = self._poll.poll(-1, 1)
            if fd != self._wire_fd:
                os.eventfd_read(self._rings)
                return 1
        except BlockingIOError:
            # Another thread was faster.
            return 0
        except OSError:
            self._wire.fail()
        with self._lock:
            # Awake, as far as others are concerned.
            self._waiting -= 1
        more = self._wire.read()
        with self._lock:
            self._waiting += 1
        if more:
            # What was read is in the queue: what somebody else reads from here on stands behind it.
            self._expect()
        return 0

    def _expect(self) -> None:
        """Have one thread told when there is something to read."""
        try:
            self._poll.modify(self._wire_fd, self._once)
        except OSError:
            self._wire.fail()
