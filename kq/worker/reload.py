"""HUP: is the code and configuration as it is now fit to run, and does the supervisor have to change?

A fresh interpreter tries, beside the running worker: `kq.worker.probe`. A worker that gets a mistake for an
answer goes on as it was: a reload is all or nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from threading import Thread
from typing import Any, NoReturn

from kq.worker.process import ANSWER, flush
from kq.worker.start import folder

#: Seconds that loading the app may take.
_PATIENCE = 120.0


class Trial(Thread):
    """Tries the code and configuration as they are now, in another process.

    Args:
        app_path: ``module:attribute``; empty for the app that the configuration file describes.
        overrides: Settings that the command line changed, by name.
        fingerprint: What `App.fingerprint` says of the worker that runs.
        options: Of its `WorkerOptions` those that say what it consumes, how, and how long it tries to connect, but for
            what is the configuration file's to say.
        on_end: Called in this thread when the answer is there.

    Attributes:
        ended: Whether the answer is there.
        fingerprint: What `App.fingerprint` says now, or None.
        mistake: Why nothing can be reloaded, or empty.
    """

    def __init__(
        self,
        app_path: str,
        overrides: Mapping[str, Any],
        fingerprint: str,
        options: Mapping[str, Any],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(name="kq-reload", daemon=True)
        self._command = [sys.executable, "-m", "kq.worker.probe", app_path]
        # Not among the arguments, which everybody on the machine can read: there may be a password in it.
        self._input = json.dumps({"overrides": dict(overrides), "fingerprint": fingerprint, "options": dict(options)})
        self._on_end = on_end
        self.ended = False
        self.fingerprint: str | None = None
        self.mistake = ""

    def begin(self) -> None:
        """Start; where there is no room for a thread, that is the answer."""
        try:
            self.start()
        except (RuntimeError, MemoryError) as error:
            self.mistake = f"it could not be tried: {error}"
            self.ended = True

    def run(self) -> None:
        """Run the process and keep its answer."""
        try:
            done = subprocess.run(
                self._command, input=self._input, capture_output=True, text=True, errors="replace", timeout=_PATIENCE,
                check=False, cwd=folder(),
            )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.mistake = f"it could not be tried: {error}"
        else:
            answer = next((line for line in done.stdout.splitlines() if line.startswith(ANSWER)), None)
            if done.returncode == 0 and answer is not None:
                self.fingerprint = answer.removeprefix(ANSWER)
            else:
                self.mistake = done.stderr.strip()[-4096:] or f"its trial ended with code {done.returncode}"
        finally:
            self.ended = True
            self._on_end()


def start_anew() -> NoReturn:
    """Replace this process by a fresh one with the same arguments and the same process id.

    Signals that are not to end it before it listens are ignored by now: see `Prelude.close_ears`.
    """
    flush()
    if (start := folder()) is not None:
        os.chdir(start)
    os.execv(sys.executable, sys.orig_argv)
