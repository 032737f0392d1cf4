"""Consumers that compete for one queue; imported by workers beside the shop, whose history they write."""

import ctypes
import time

from shop import QUEUE, app, note

import kq

BACKOFF = kq.Backoff(initial=0.05, jitter="none")


def both(name, payload):
    """Do what the payload says, and write down who did it."""
    note(f"{name} started", payload)
    if payload["do"] == "hold":
        # Nothing inside the process can stop it.
        ctypes.PyDLL(None).usleep(int(payload["seconds"] * 1e6))
    else:
        time.sleep(payload["seconds"])
    note(f"{name} done", payload)


@app.consumer(QUEUE + "-shared", concurrency=1)
def narrow(payload):
    """Run one at a time."""
    both("narrow", payload)


@app.consumer(QUEUE + "-shared", concurrency=3)
def wide(payload):
    """Run three at a time."""
    both("wide", payload)


@app.consumer(QUEUE + "-timed", concurrency=1, timeout=0.3, max_attempts=1, retry=BACKOFF)
def short(payload):
    """Be late."""
    both("short", payload)


@app.consumer(QUEUE + "-timed", concurrency=1)
def long(payload):
    """Take as long as it takes."""
    both("long", payload)
