"""The program ``python -m kq.worker.probe APP``: would a worker of this app start?

It loads the app, the configuration and every handler, in a fresh interpreter, and prints the configuration's
fingerprint; or says on stderr what is wrong. If the configuration is not that of the worker that runs, it also
asks the policies, reaches the brokers and declares the queues, as a worker does at its start. What it has to
know of the worker that runs comes as JSON on stdin.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Final

from kq.config import unknown_is_shown
from kq.errors import Error
from kq.target import open_app
from kq.worker.option import WorkerOptions
from kq.worker.process import ANSWER, flush
from kq.worker.worker import Worker

#: Options of a worker by which it may be unable to start.
_ASKED: Final = ("queues", "connect_timeout", "pool")


def main(app_path: str) -> int:
    """Print the fingerprint of the app as it is now; the exit code says whether it loads."""
    running = json.load(sys.stdin)
    unknown_is_shown()
    try:
        app = open_app(app_path, running["overrides"])
        app.declarations.check_drivers()
        file = app.document.worker.values
        options = {**{name: file[name] for name in _ASKED if name in file}, **running["options"]}
        # It refuses what it could not work on.
        worker = Worker(app, app_path=app_path, options=WorkerOptions(**options), quiet=True)
        if app.fingerprint() != running["fingerprint"]:
            worker.rehearse()
    except Error as error:
        sys.stderr.write(error.message + "\n")
        return 78
    sys.stdout.write(f"\n{ANSWER}{app.fingerprint()}\n")
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    flush()
    # All is said: neither threads that the app has started are waited for, nor what it has to say at its end.
    os._exit(code)
