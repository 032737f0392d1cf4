"""Waits no longer than it should for what may take longer.

The system looks a host's name up for as long as it likes, and connecting tries each of its addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import TypeVar

_T = TypeVar("_T")


def within(seconds: float, make: Callable[[], _T], drop: Callable[[_T], None]) -> _T:
    """Return what ``make`` makes, in a thread of its own.

    Args:
        seconds: How long to wait for it.
        make: Called once. What it raises is raised here.
        drop: Called with what is made when nobody waits for it any more.

    Raises:
        TimeoutError: If it takes longer.
    """
    made: list[_T] = []
    failed: list[BaseException] = []
    ended, lock = Event(), Lock()
    is_awaited = True

    def run() -> None:
        try:
            found = make()
        except BaseException as error:
            failed.append(error)
            ended.set()
            return
        with lock:
            if is_awaited:
                made.append(found)
        if made:
            ended.set()
        else:
            drop(found)

    thread = Thread(target=run, name="kq-connect", daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        # No room for one more. Then here, however long it takes.
        return make()
    try:
        ended.wait(seconds)
    finally:
        with lock:
            is_awaited = False
    if failed:
        raise failed[0]
    if not made:
        raise TimeoutError(f"nothing within {seconds:g} s")
    return made[0]
