"""The first children, forked before this process has loaded the app, or connected, or started a thread.

They share with it, and with each other, the memory of all that is loaded by then, and need no interpreter of their own.
Each loads the app by itself, as those do that replace it, which are fresh interpreters (`kq.worker.process`).
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kq.worker import child
from kq.worker.process import Process
from kq.worker.slot import SlotTable


@contextmanager
def prefork(count: int, concurrency: int) -> Iterator[list[Process]]:
    """Fork this process, and end at the end those forks that nobody has taken from the list.

    They wait for their `Hello`. There are none where forking is not safe.

    Args:
        count: How many.
        concurrency: Handlers of each kind in each.
    """
    forks: list[Process] = []
    if count and _is_alone():
        # What is there by now stays: the collector is not to look at it, which would make copies of its pages.
        gc.freeze()
        _fill(forks, count, concurrency)
    # Not before: in a fork nothing of this is to be tidied up.
    try:
        yield forks
    finally:
        for fork in forks:
            fork.end()


def _is_alone() -> bool:
    """Tell whether this process has one thread, also where libraries have started some that Python does not know."""
    try:
        # Linux has it. Elsewhere nobody can tell, and there are no forks.
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _fill(forks: list[Process], count: int, concurrency: int) -> None:
    try:
        while len(forks) < count:
            forks.append(Process.fork(concurrency, _serve, forks))
    except OSError:
        # No room for more: whoever needs them says so, and tries again.
        pass


def _serve(connection: socket.socket, slots: SlotTable, parent: int) -> int:
    # What an app may look at is as it is in those that come later.
    sys.argv[:] = [child.__file__]
    return child.serve(connection, slots, parent)
