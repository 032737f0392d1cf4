"""The app that the worker's tests run; each payload says what is to happen to it."""

import asyncio
import ctypes
import json
import multiprocessing
import os
import sys
import time

import kq
from kq import errors, queue
from kq.worker import slot

QUEUE = os.environ["KQ_TEST_QUEUE"]
VERSION = 1

app = kq.App("shop")
_history = os.open(os.environ["KQ_TEST_HISTORY"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(event, payload):
    """Write a line that survives whatever happens next."""
    fields = {
        "event": event,
        "n": payload["n"],
        "attempt": queue.message().attempt(),
        "pid": os.getpid(),
        "version": VERSION,
        "at": time.monotonic(),
    }
    os.write(_history, json.dumps(fields).encode() + b"\n")


@app.consumer(QUEUE, max_attempts=4, retry=kq.Backoff(initial=0.05, jitter="none"))
def handle(payload):
    """Do what the payload says."""
    note("started", payload)
    do = payload.get("do", "nothing")
    if do == "sleep":
        time.sleep(payload["seconds"])
    elif do == "fail":
        if queue.message().attempt() <= payload["times"]:
            raise errors.Internal("not yet")
    elif do == "invalid":
        raise errors.Invalid("never")
    elif do == "segfault":
        ctypes.string_at(0)
    elif do == "break" and queue.message().attempt() == 1:
        # As where memory runs out between two handlers: their thread cannot go on.
        slot.SlotTable.leave = None
    elif do == "exit":
        os._exit(payload["code"])
    elif do == "close":
        os.closerange(3, 256)
    elif do == "fork":
        copy = os.fork()
        if copy == 0:
            return
        os.waitpid(copy, 0)
    elif do == "process":
        process = multiprocessing.get_context("spawn").Process(target=os.getpid)
        process.start()
        process.join(20)
        assert process.exitcode == 0
    elif do == "sys.exit":
        sys.exit(1)
    elif do == "recurse":
        sys.setrecursionlimit(10**9)
        repr(_nested())
    note("done", payload)


@app.consumer(QUEUE + "-limited", max_attempts=2, timeout=0.5, retry=kq.Backoff(initial=0.05, jitter="none"))
def handle_limited(payload):
    """Hold the interpreter, so that nothing inside the process can stop it."""
    note("started", payload)
    time.sleep(payload.get("seconds", 0))
    if payload.get("do") == "block":
        # Lets go of the interpreter, and no exception reaches it.
        ctypes.CDLL(None).sleep(600)
    if payload.get("do") == "look":
        while True:
            app.info(QUEUE)
    if payload.get("do") == "hold":
        ctypes.PyDLL(None).sleep(600)
    note("done", payload)


@app.consumer(QUEUE + "-once", auto_ack=True)
def handle_once(payload):
    """Run at most once."""
    note("started", payload)
    time.sleep(payload.get("seconds", 0))
    note("done", payload)


@app.consumer(QUEUE + "-async")
async def handle_async(payload):
    """Wait without blocking."""
    note("started", payload)
    await asyncio.sleep(payload.get("seconds", 0))
    note("done", payload)


@app.consumer(QUEUE + "-async-limited", max_attempts=2, timeout=0.5, retry=kq.Backoff(initial=0.05, jitter="none"))
async def handle_async_limited(payload):
    """Wait, or block everybody else who does."""
    note("started", payload)
    await asyncio.sleep(payload.get("seconds", 0))
    if payload.get("do") == "block":
        _block()
    note("done", payload)


def _block():
    time.sleep(600)


def _nested():
    value = []
    for _ in range(10**6):
        value = [value]
    return value
