"""The program ``python -m kq.worker.probe APP``: would a worker of this app start?

It loads the app, the configuration and every handler, in a fresh interpreter, and prints the configuration's
fingerprint; or says on stderr what is wrong. Settings that win over all others come as JSON on stdin.
"""

from __future__ import annotations

import json
import sys

from kq.errors import Error
from kq.target import open_app
from kq.worker.worker import Worker


def main(app_path: str) -> int:
    """Print the fingerprint of the app as it is now; the exit code says whether it loads."""
    try:
        app = open_app(app_path, json.load(sys.stdin))
        app.declarations.check_drivers()
        # It refuses what it could not work on.
        Worker(app, app_path=app_path)
    except Error as error:
        sys.stderr.write(error.message + "\n")
        return 78
    sys.stdout.write(f"\n{app.fingerprint()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
