"""The app that workers run under fire: each payload says what is to happen to it, at each attempt.

``KQ_TEST_CHAOS`` holds, as JSON, ``queue``, ``history`` (a folder), ``consumer`` (arguments of the consumer) and
``declare`` (arguments of the queue); see `tests.chaos.stage`.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

import kq
from kq import errors, queue
from tests.chaos.history import Writer

SAID = json.loads(os.environ["KQ_TEST_CHAOS"])
QUEUE = SAID["queue"]

if SAID.get("broken"):
    raise RuntimeError("this module does not import, on purpose")

app = kq.App("chaos")
app.queue(QUEUE, **SAID.get("declare", {}))
history = Writer(SAID["history"])


@app.consumer(
    QUEUE,
    retry=kq.Backoff(initial=0.05, factor=2.0, max=0.5, jitter=0.2),
    **SAID.get("consumer", {}),
)
def handle(payload):
    """Note the start, do what the payload says, note the end."""
    message = queue.message()
    id, attempt = payload["id"], message.attempt()
    history.write("started", id, attempt, f"deliveries {message.headers(reserved=True).get('x_crashes', 0)}")
    plan = payload.get("plan", [])
    act = plan[min(attempt, len(plan)) - 1] if plan else "ok"
    time.sleep(payload.get("ms", 0) / 1000)
    _ACTS[act]()
    if payload.get("crc", zlib.crc32(b"")) != zlib.crc32(payload.get("pad", "").encode()):
        id = f"torn-{id}"
    history.write("done", id, attempt)


def _fail():
    raise errors.Internal("not this time")


def _invalid():
    raise errors.Invalid("never")


def _segfault():
    ctypes.string_at(0)


def _sys_exit():
    sys.exit(0)


def _interrupt():
    raise KeyboardInterrupt


def _recurse():
    sys.setrecursionlimit(10**9)
    value = []
    for _ in range(10**6):
        value = [value]
    repr(value)


def _memory_error():
    limit, most = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, most))
    try:
        bytearray(2**31)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _grow_and_die():
    # What the kernel does to a process that has taken too much: memory that was used, then SIGKILL.
    hoard = bytearray(64 * 2**20)
    hoard[:: resource.getpagesize()] = b"\1" * len(hoard[:: resource.getpagesize()])
    os.kill(os.getpid(), signal.SIGKILL)


def _hold():
    # Sleeps without letting go of the interpreter: nothing inside the process can stop it.
    ctypes.PyDLL(None).sleep(600)


def _fork_and_leave():
    # A process of the handler's own that outlives it, unless somebody sees to it.
    if os.fork() == 0:
        threading.Event().wait(600)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_the_worker():
    os.kill(os.getppid(), signal.SIGKILL)
    # Until the kernel takes this process along.
    time.sleep(600)


_ACTS = {
    "ok": lambda: None,
    "fail": _fail,
    "invalid": _invalid,
    "segfault": _segfault,
    "exit 0": lambda: os._exit(0),
    "exit 1": lambda: os._exit(1),
    "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "recurse": _recurse,
    "grow and die": _grow_and_die,
    "sys.exit": _sys_exit,
    "interrupt": _interrupt,
    "memory error": _memory_error,
    "hold": _hold,
    "fork and die": _fork_and_leave,
    "kill the worker": _kill_the_worker,
    "sleep": lambda: time.sleep(600),
}
