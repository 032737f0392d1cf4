"""A child's process: how it is made, how it is killed, how its end is learnt.

There are two ways to make one. Any time, as a fresh interpreter: nothing of this process's connections, locks and
threads is in it, and it loads the code as it is by then. Or, where there is nothing of that yet, as a fork: it shares
the memory of all that both have loaded, and starts at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from kq.outcome import Death
from kq.worker.slot import SlotTable
from kq.worker.start import folder

#: Bytes that the system is to hold of what a child has not read yet; it may allow less.
_SEND_BUFFER = 1 << 20
#: Signals that mean the whole worker, and end no child: the supervisor says what is to happen.
FOR_SUPERVISOR = frozenset(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)

#: What a probe's answer begins with, among whatever the app prints.
ANSWER: Final = "kq-fingerprint "

#: A child's program: takes its end of the socket, its slots and its parent's number, and returns the exit code.
Program = Callable[[socket.socket, SlotTable, int], int]


class Process:
    """The supervisor's handle of a child's process. Not thread-safe.

    Attributes:
        pid: Its number.
        concurrency: Handlers of each kind that its slots are for.
        socket: Our end of the connection; does not block.
        slots: What it runs.
        pid_fd: Becomes readable when it ends; None where the system has no such thing.
        death: How it ended, once that is known.
    """

    def __init__(
        self,
        pid: int,
        concurrency: int,
        connection: socket.socket,
        slots: SlotTable,
        popen: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.pid = pid
        self.concurrency = concurrency
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.socket = connection
        self.slots = slots
        self.pid_fd = _pid_fd(pid)
        self.death: Death | None = None
        #: Kept, for it would look after the process when it is dropped.
        self._popen = popen

    @classmethod
    def spawn(cls, concurrency: int) -> Process:
        """Make one that is a fresh interpreter.

        Raises:
            OSError: If there is no room for it.
        """
        ours, theirs = socket.socketpair()
        slots = SlotTable(2 * concurrency)
        numbers = (theirs.fileno(), slots.fd, slots.count, os.getpid())
        try:
            with theirs:
                popen = subprocess.Popen(
                    [sys.executable, "-m", "kq.worker.child", *map(str, numbers)],
                    pass_fds=(theirs.fileno(), slots.fd),
                    cwd=folder(),
                    stdin=subprocess.DEVNULL,
                    # A session of its own: the terminal's Ctrl-C is the supervisor's, and one kill
                    # reaches whatever a handler has started.
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            slots.close()
            raise
        return cls(popen.pid, concurrency, ours, slots, popen)

    @classmethod
    def fork(cls, concurrency: int, program: Program, beside: Sequence[Process] = ()) -> Process:
        """Make one that is a fork of this process, which must have no other threads. There it does not return.

        Args:
            concurrency: Handlers of each kind.
            program: What it runs, with `FOR_SUPERVISOR` held back.
            beside: Forks made before, of which it is to hold nothing.

        Raises:
            OSError: If there is no room for it.
        """
        # What waits to be written is written once.
        flush()
        ours, theirs = socket.socketpair()
        slots = SlotTable(2 * concurrency)
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_SUPERVISOR)
        try:
            pid = os.fork()
        except OSError:
            for end in (ours, theirs, slots):
                end.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            raise
        if not pid:
            _live(ours, beside, lambda: program(theirs, slots, parent))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return cls(pid, concurrency, ours, slots)

    def kill(self) -> None:
        """Kill it and everything it started; the end is noticed as any other."""
        if self.death is not None:
            # Its number may be somebody else's by now.
            return
        for send in (os.killpg, os.kill):
            # Not Popen.kill, which would take its exit status before `reap` sees it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.pid, signal.SIGKILL)

    def reap(self, *, wait: bool = False) -> Death | None:
        """Return how the process ended, or None while it runs.

        Args:
            wait: Whether to wait for its end.
        """
        if self.death is None:
            # Not Popen.poll: only here does the kernel say how much memory it has used.
            try:
                pid, status, usage = os.wait4(self.pid, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                # Somebody else in this process has taken its exit status.
                self.death = Death()
                return self.death
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if self._popen is not None:
                    self._popen.returncode = code
                peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                self.death = Death(exit_signal=-code, peak_memory=peak) if code < 0 else Death(code, peak_memory=peak)
        return self.death

    def close(self) -> None:
        """Give up what is left of a dead one."""
        # Its group may outlive it: a handler's own processes end with their child.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.close_ends()

    def close_ends(self) -> None:
        """Close our ends of what we share with it."""
        self.socket.close()
        self.slots.close()
        if self.pid_fd is not None:
            os.close(self.pid_fd)
            self.pid_fd = None

    def end(self) -> None:
        """Kill it, wait for its end, and give up what is left."""
        self.kill()
        self.reap(wait=True)
        self.close()


def flush() -> None:
    """Write what waits to be written, as far as it can be."""
    for stream in (sys.stdout, sys.stderr):
        # They are None where they were closed from the start, and an app may have put in anything.
        with contextlib.suppress(Exception):
            stream.flush()


def _live(parents_end: socket.socket, beside: Sequence[Process], program: Callable[[], int]) -> NoReturn:
    """Do in a fork what it is for, and end as an interpreter does; nothing of its parent's is gone on with."""
    code = 1
    try:
        _leave_home(parents_end, beside)
        code = program()
        # As `multiprocessing` ends its forks: threads that are to be waited for, then what is to be called at the end.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        if sys.stderr is not None:
            traceback.print_exc()
    finally:
        flush()
        os._exit(code)


def _leave_home(parents_end: socket.socket, beside: Sequence[Process]) -> None:
    """Give up what is the parent's: the connections, the terminal, what is typed."""
    parents_end.close()
    for other in beside:
        other.close_ends()
    os.setsid()
    # Where the parent has no standard input, this is already it.
    nothing = os.open(os.devnull, os.O_RDONLY)
    if nothing:
        os.dup2(nothing, 0)
        os.close(nothing)


def _pid_fd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends, where the system has such a thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
