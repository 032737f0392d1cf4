"""The child's program: ``python -m kq.worker.child SOCKET SLOTS COUNT PARENT``.

It loads the app, runs the jobs that come over the socket, and answers with outcomes. It never talks to
the broker, unless a handler publishes. When the socket closes the supervisor is gone, and so is the
child.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from threading import Event, Lock
from typing import Any, NoReturn

from kq.config import unknown_is_shown
from kq.config_file import FOUND
from kq.outcome import DONE
from kq.shield import shielded
from kq.target import open_app
from kq.worker import frame
from kq.worker.ending import end_in_time
from kq.worker.log import configure
from kq.worker.process import FOR_SUPERVISOR, flush
from kq.worker.runner import Result, Runner
from kq.worker.slot import SlotTable
from kq.worker.wire_queue import CAN_SHARE

logger = logging.getLogger("kq.worker")

_PR_SET_PDEATHSIG = 1


class Child:
    """Reads frames, feeds the runner, writes frames.

    Args:
        connection: The way to the supervisor.
        slots: Where to note what runs.
        shared: Whether the runner's threads read, when they have nothing to run, once the app is loaded; else it is
            always the caller of `run`.
    """

    def __init__(self, connection: socket.socket, slots: SlotTable, *, shared: bool = CAN_SHARE) -> None:
        self._shared = shared
        self._socket = connection
        self._slots = slots
        self._writing = Lock()
        self._reader = frame.in_child()
        self._runner: Runner | None = None
        self._app: Any = None
        self._held = 0
        self._counting = Lock()
        self._final = False
        self._finished = Event()
        self._failed = False

    def run(self) -> int:
        """Serve until the supervisor says it is enough; return the exit code."""
        while not (self._runner or self._finished.is_set()):
            self.read()
        if self._shared and self._runner is not None:
            self._runner.read_wire()
            self._finished.wait()
        while not self._finished.is_set():
            self.read()
        if self._failed:
            return 1
        if self._runner is not None:
            self._runner.flush()
        if self._app is not None:
            self._app.close()
        return 0

    def fileno(self) -> int:
        """See `Wire.fileno`."""
        return self._socket.fileno()

    def read(self) -> bool:
        """See `Wire.read`."""
        try:
            data = self._socket.recv(frame.READ_SIZE)
            if not data and not self._finished.is_set():
                # The supervisor is gone; what runs here will be delivered again.
                os._exit(1)
            for message in self._reader.feed(data):
                if not self._take(message):
                    self._failed = True
                    self._finished.set()
            if self._final:
                with self._counting:
                    if not self._held:
                        self._finished.set()
            return not self._finished.is_set()
        except BaseException:
            _end_broken()

    def fail(self) -> NoReturn:
        """See `Wire.fail`."""
        _end_broken()

    def _take(self, message: Any) -> bool:
        if isinstance(message, frame.Work):
            assert self._runner is not None
            with self._counting:
                self._held += len(message.jobs)
            self._runner.submit(message.jobs)
        elif isinstance(message, frame.Hello):
            return self._load(message)
        elif isinstance(message, frame.Recall):
            tags = self._runner.recall() if self._runner is not None else []
            self._send(frame.Returned(tags))
            # Not before: whoever reports the last result then would end the child, and this were never sent.
            with self._counting:
                self._held -= len(tags)
                self._final = self._final or message.final
        elif isinstance(message, frame.Dump) and self._runner is not None:
            logger.warning("%s", self._runner.dump(), extra={"action": "dump"})
        return True

    def _load(self, hello: frame.Hello) -> bool:
        configure(hello.log_level, hello.log_format, loaded=False)
        unknown_is_shown()
        try:
            app = open_app(hello.app, hello.overrides)
            # What handlers start, perhaps in another folder, has a file of its own.
            os.environ.pop(FOUND, None)
        except BaseException as error:
            self._send(frame.Failed(str(error) or repr(error)))
            return False
        # The app may have made itself at home.
        leave_signals_to_supervisor()
        configure(hello.log_level, hello.log_format, loaded=True)
        self._app = app
        timeouts = [c.timeout for c in app.registry.router if c.queue in hello.queues and c.timeout is not None]
        self._runner = Runner(
            app.executor(),
            concurrency=hello.concurrency,
            shortest_timeout=min(timeouts, default=None),
            slots=self._slots,
            emit=self._emit,
            on_broken=_end_broken,
            on_out_of_memory=lambda: self._send(frame.Exhausted()),
            wire=self if self._shared else None,
        )
        self._send(frame.Ready(app.fingerprint() != hello.fingerprint))
        return True

    def _emit(self, results: list[Result], early: bool) -> None:
        done = [tag for tag, outcome in results if outcome is DONE]
        others = [(tag, outcome) for tag, outcome in results if outcome is not DONE]
        self._send(frame.Results(done, others, early))
        if early:
            return
        with self._counting:
            self._held -= len(results)
            last = self._final and self._held <= 0
        if last:
            self._finished.set()
            # Whoever reads waits for frames that will not come.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RD)

    def _send(self, message: frame.FromChild) -> None:
        try:
            data = frame.encode(message)
            # A time limit that strikes in the middle of a frame would garble all that follow.
            with shielded(), self._writing:
                self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            # The supervisor is gone; what runs here will be delivered again.
            os._exit(1)
        except BaseException:
            # Nothing can be reported from here any more: whatever runs is charged with it, the rest runs elsewhere.
            logger.critical("cannot answer the supervisor; ending", exc_info=True, extra={"action": "child_mute"})
            os._exit(1)


def main(arguments: list[str]) -> int:
    """Run the child's program and return its exit code."""
    connection_fd, slots_fd, slot_count, parent = map(int, arguments)
    return serve(socket.socket(fileno=connection_fd), SlotTable(slot_count, slots_fd), parent)


def serve(connection: socket.socket, slots: SlotTable, parent: int) -> int:
    """Do a child's work in this process; return its exit code, 0, or end the process.

    Args:
        connection: The way to the supervisor.
        slots: Where to note what runs.
        parent: The supervisor's number.
    """
    die_with(parent)
    leave_signals_to_supervisor()
    try:
        code = Child(connection, slots).run()
    except BaseException:
        _end_broken()
    if code:
        _end(code)
    end_in_time(code)
    return code


def _end_broken() -> NoReturn:
    """End the process, because of the exception that is being handled."""
    try:
        logger.critical("a child cannot go on", exc_info=True, extra={"action": "child_failed"})
    finally:
        # Also where there is not even the memory to say so.
        _end(1)


def _end(code: int) -> NoReturn:
    # Without waiting for threads that the app has started: they may never end.
    flush()
    os._exit(code)


def leave_signals_to_supervisor() -> None:
    """Have signals that mean the whole worker end nothing here: the supervisor says what is to happen.

    A service manager sends TERM to every process of a service, and would kill handlers that the
    supervisor lets finish. Ignoring would be inherited by whatever a handler starts; a function is not.
    """
    me = os.getpid()

    def pass_over(number: int, frame: object) -> None:
        if os.getpid() != me:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in FOR_SUPERVISOR:
        signal.signal(number, pass_over)
    # A fork is made with them held back.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_SUPERVISOR)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
