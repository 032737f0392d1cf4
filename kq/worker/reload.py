"""HUP: is the code and configuration as it is now fit to run, and does the supervisor have to change?

A fresh interpreter tries, beside the running worker: ``python -m kq.worker.reload APP``. It loads the app, the
configuration and every handler, and answers with the configuration's fingerprint. A worker that gets a
mistake for an answer goes on as it was: a reload is all or nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any

from kq.errors import Error

#: Seconds that loading the app may take.
_PATIENCE = 120.0


class Trial(Thread):
    """Tries the code and configuration as they are now, in another process.

    Args:
        app_path: ``module:attribute``; empty for the app that the configuration file describes.
        settings: Settings that the command line changed, by name.
        on_end: Called in this thread when the answer is there.

    Attributes:
        fingerprint: What `Declarations.fingerprint` says now, or None.
        mistake: Why nothing can be reloaded, or empty.
    """

    def __init__(self, app_path: str, settings: Mapping[str, Any], on_end: Callable[[], None]) -> None:
        super().__init__(name="kq-reload", daemon=True)
        self._command = [sys.executable, "-m", "kq.worker.reload", app_path]
        # Not among the arguments, which everybody on the machine can read: there may be a password in it.
        self._input = json.dumps(dict(settings))
        self._on_end = on_end
        self.fingerprint: str | None = None
        self.mistake = ""

    def run(self) -> None:
        """Run the process and keep its answer."""
        try:
            done = subprocess.run(
                self._command, input=self._input, capture_output=True, text=True, timeout=_PATIENCE, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self.mistake = f"it could not be tried: {error}"
        else:
            if done.returncode == 0:
                self.fingerprint = done.stdout.strip().rpartition("\n")[2]
            else:
                self.mistake = done.stderr.strip()[-4096:] or f"its trial ended with code {done.returncode}"
        self._on_end()


def start_anew() -> None:
    """Replace this process by a fresh one with the same arguments and the same process id."""
    import signal

    if hasattr(signal, "SIGHUP"):
        # Being ignored outlives the change; a HUP in between would end the new one before it listens.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


def main(app_path: str) -> int:
    """Print the fingerprint of the app as it is now; the exit code says whether it loads."""
    from kq.target import load_app

    settings: dict[str, Any] = json.load(sys.stdin)
    try:
        app = load_app(app_path)
        if settings:
            app.registry.override(**settings)
        app.declarations.load_handlers()
    except Error as error:
        sys.stderr.write(error.message + "\n")
        return 78
    sys.stdout.write(f"\n{app.declarations.fingerprint()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
