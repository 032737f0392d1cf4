"""The end of a process, which threads that an app has started, and does not end, are not to hold up for ever."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from kq.worker.process import flush

logger = logging.getLogger("kq.worker")

#: Seconds that an interpreter that ends waits for threads, and for what is to be called at its end.
PATIENCE: Final = 5.0


@contextmanager
def ending() -> Iterator[None]:
    """Do the last thing of a process: what it ends with is kept, also where it has to be ended by force."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except Exception as error:
        # As click ends with it.
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        end_in_time(code)


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
