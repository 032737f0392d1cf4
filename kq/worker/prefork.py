"""The first children, forked before this process has loaded the app, or connected, or started a thread.

They share with it, and with each other, the memory of all that is loaded by then, and need no interpreter of their own.
Each loads the app by itself, as those do that replace it, which are fresh interpreters (`kq.worker.process`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kq.worker import child
from kq.worker.process import Process
from kq.worker.slot import SlotTable

#: What is shown as a fork's command line.
_TITLE: Final = b"kq.worker.child, forked"
#: Where in a process's state the address of its command line stands, counted from behind its name.
_ARG_START: Final = 45


def fill_standard_streams() -> None:
    """Open those descriptors of the standard streams that are closed.

    Else a socket or a table of a child that is started later might have the number, which is the child's output.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


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
    # What an app, `multiprocessing` or a person may look at is as it is with those that come later.
    sys.argv[:] = [child.__file__]
    sys.modules["__main__"] = child
    _show(_TITLE)
    return child.serve(connection, slots, parent)


def _show(title: bytes) -> None:
    """Have the system show another command line for this process, as far as there is room for it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # What follows the name, which may have blanks and brackets in it: https://man7.org/linux/man-pages/man5/proc.5.html
        fields = Path("/proc/self/stat").read_bytes().rpartition(b") ")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_START + 1])
        if 0 < start < end:
            ctypes.memmove(start, title[: end - start - 1].ljust(end - start, b"\0"), end - start)
