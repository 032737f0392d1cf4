"""The end of a process, which threads that an app has started, and does not end, are not to hold up for ever."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from typing import Final

from kq.worker.process import flush

logger = logging.getLogger("kq.worker")

#: Seconds that an interpreter that ends waits for threads, and for what is to be called at its end.
PATIENCE: Final = 5.0


def end_in_time(code: int) -> None:
    """Have this process, whose interpreter is about to end, ended by force if that takes long.

    Args:
        code: What it exits with.
    """

    def watch() -> None:
        threading.Event().wait(PATIENCE)
        # Where somebody has called a command as a function, nothing ends.
        if getattr(threading, "_SHUTTING_DOWN", True):
            names = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
            what = f"threads that go on ({', '.join(names)})" if names else "what is called at its end"
            logger.warning(
                "not waiting any longer for %s; ending process %d", what, os.getpid(), extra={"action": "ended"}
            )
            flush()
            os._exit(code)

    # Without room for a thread there is none to wait for, either.
    with suppress(RuntimeError, MemoryError):
        threading.Thread(target=watch, name="kq-end", daemon=True).start()
