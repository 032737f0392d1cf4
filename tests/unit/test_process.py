"""Children's processes, without an app: made, killed, waited for; each in a fresh interpreter, which is forked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux only")

ROOT = Path(__file__).parents[2]
HEAD = """
import os, select, signal, socket, sys, threading
from kq.worker.prefork import prefork
from kq.worker.process import Process

def answer(connection, slots, parent):
    # Echoes once, and notes what it runs.
    data = connection.recv(100)
    slots.enter(0, int(data), 1.5)
    connection.sendall(b"%d %d %d" % (os.getpid(), os.getppid() == parent, os.getsid(0) == os.getpid()))
    return 0

def read(process):
    select.select([process.socket], [], [], 30)
    return process.socket.recv(100)

def ended(process):
    select.select([process.pid_fd], [], [], 30)
    return process.reap()
"""


def run(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_fork_serves_and_ends() -> None:
    """It has its socket and its slots, is a session of its own, and ends with its program's exit code."""
    lines = run("""
print("before")  # in a buffer: to be written once
fork = Process.fork(2, answer)
fork.socket.sendall(b"7")
print(read(fork) == b"%d 1 1" % fork.pid)
death = ended(fork)
print(death.exit_code, death.peak_memory > 0, fork.slots.running())
fork.close()
""")
    assert lines == ["before", "True", "0 True [Running(tag=7, started_at=1.5, is_struck=False)]"]


def test_a_fork_reads_nothing_and_gets_the_signals_of_its_own() -> None:
    """Its standard input is empty; what was held back while it was made is let through by its program."""
    lines = run("""
def look(connection, slots, parent):
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    connection.sendall(b"%s %d" % (sys.stdin.read().encode() or b"nothing", signal.SIGTERM in held))
    return 3

fork = Process.fork(1, look)
print(read(fork).decode(), signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
print(ended(fork).exit_code)
fork.close()
""")
    assert lines == ["nothing 1 False", "3"]


def test_a_fork_never_goes_on_as_its_parent() -> None:
    """Whatever its program does, it ends, as an interpreter does, and what its parent would do next it does not."""
    lines = run("""
import atexit

def outlive():
    # Until the program is over, and whoever waits for threads has begun to.
    threading.main_thread().join()
    print("thread", flush=True)

def broken(connection, slots, parent):
    raise RuntimeError("broken")

def leaves(connection, slots, parent):
    threading.Thread(target=outlive).start()
    atexit.register(print, "at exit", flush=True)
    sys.stderr = None
    sys.exit(4)

def fine(connection, slots, parent):
    threading.Thread(target=outlive).start()
    atexit.register(print, "at exit", flush=True)
    sys.stdout.write("unflushed")
    return 0

try:
    for program in (broken, leaves, fine):
        fork = Process.fork(1, program)
        print(ended(fork).exit_code, flush=True)
        fork.close()
finally:
    print("once", flush=True)
""")
    assert lines == ["1", "1", "unflushedthread", "at exit", "0", "once"]


def test_a_fork_holds_nothing_of_its_siblings() -> None:
    """The first sees the end of its connection although the second one lives."""
    lines = run("""
forks = []
for _ in range(2):
    forks.append(Process.fork(1, answer, forks))
forks[0].socket.close()  # the last copy, or it sees no end
first = ended(forks[0])
print(first.exit_code != 0, forks[1].reap())
forks[0].close()
forks[1].end()
print(forks[1].death)
""")
    assert lines == ["True None", "was killed by signal 9 (SIGKILL)"]


def test_what_was_not_taken_is_ended() -> None:
    """At the end of the block, and whatever was taken goes on."""
    lines = run("""
with prefork(2, 4) as forks:
    print(len(forks), {fork.concurrency for fork in forks})
    taken = forks.pop()
    left = forks[0]
print(left.death.exit_signal, taken.reap())
taken.end()
""")
    assert lines == ["2 {4}", "9 None"]


def test_there_are_no_forks_beside_threads() -> None:
    """A fork would inherit what they have locked."""
    lines = run("""
stop = threading.Event()
threading.Thread(target=stop.wait).start()
with prefork(2, 4) as forks:
    print(len(forks))
stop.set()
""")
    assert lines == ["0"]


def test_a_fresh_interpreter_serves_and_ends() -> None:
    """Without a word it ends when its connection does."""
    lines = run("""
process = Process.spawn(2)
print(process.reap(), process.concurrency, process.slots.count)
process.socket.close()
death = ended(process)
print(death.exit_code)
process.close()
""")
    assert lines == ["None 2 4", "1"]
