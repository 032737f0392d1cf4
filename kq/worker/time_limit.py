"""The time limit of an async handler, which is not charged with the time for which others held its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from time import monotonic
from typing import Any, Final, Generic, TypeVar

_T = TypeVar("_T")

#: Seconds by which a loop that is free may be late.
_LATE: Final = 0.05


class TimeLimit(Generic[_T]):
    """Awaits a coroutine, and cancels the task that it runs in when its time is over. Made and awaited in that task.

    A handler that blocks its event loop keeps the others there from running. Their limits pass meanwhile, and they
    could do nothing about it: by as much as the loop was late to tell them, they have time again, all in all as much as
    they had at most. What tells the two apart is whose step the limit fell into: that of the coroutine itself, or
    another one's.

    Args:
        coroutine: What is to come to its end in time.
        seconds: How long that may take.
        on_strike: Called when the task has been cancelled.
        on_moved: Called with the seconds by which the limit has been moved, for what others have taken.

    Attributes:
        has_struck: Whether the task has been cancelled for its limit.
    """

    __slots__ = (
        "_began_at", "_coroutine", "_due", "_has_overrun", "_left", "_on_moved", "_on_strike", "_rested_at", "_task",
        "_timer", "has_struck",
    )  # fmt: skip

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, _T],
        seconds: float,
        *,
        on_strike: Callable[[], None],
        on_moved: Callable[[float], None],
    ) -> None:
        self._coroutine = coroutine
        self._on_strike = on_strike
        self._on_moved = on_moved
        self._began_at = self._rested_at = monotonic()
        self._due = self._began_at + seconds
        #: Seconds that it may still be given.
        self._left = seconds
        #: Whether it was due in the middle of a step of the coroutine's own.
        self._has_overrun = False
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = task.get_loop().call_later(seconds, self._expire)
        self.has_struck = False

    def __await__(self) -> Generator[Any, Any, _T]:
        coroutine = self._coroutine
        value: Any = None
        error: BaseException | None = None
        try:
            while True:
                self._began_at = monotonic()
                try:
                    waits_for = coroutine.send(value) if error is None else coroutine.throw(error)
                except StopIteration as end:
                    result: _T = end.value
                    return result
                finally:
                    self._rested_at = monotonic()
                    # Not only the last step: another one may come before anybody has looked.
                    self._has_overrun |= self._began_at <= self._due < self._rested_at
                value = error = None
                try:
                    value = yield waits_for
                except GeneratorExit:
                    coroutine.close()
                    raise
                except BaseException as thrown:
                    error = thrown
        finally:
            error = None
            self._timer.cancel()

    @property
    def has_overrun(self) -> bool:
        """Whether the coroutine has ended after its time was over, with nobody else to blame for it."""
        return self._has_overrun or self._rested_at > self._due

    def _expire(self) -> None:
        now = monotonic()
        late = now - self._due
        more = min(late, self._left)
        if late > _LATE and more > 0 and not self._has_overrun:
            self._left -= more
            self._due = now + more
            self._timer = self._task.get_loop().call_later(more, self._expire)
            self._on_moved(late + more)
        else:
            # Whatever the handler makes of it.
            self.has_struck = self._task.cancel()
            self._on_strike()
