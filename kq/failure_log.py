"""The logger that tells of failing handlers, with their tracebacks where every formatter looks for them.

What has failed, has done so in another process: there is no exception to log, only its text.
"""

from __future__ import annotations

import logging
from typing import Final

logger: Final = logging.getLogger("kq.worker")


def _show_traceback(record: logging.LogRecord) -> bool:
    """Have formatters append a traceback that was given as ``extra``; not a filter in what it lets through."""
    traceback = getattr(record, "traceback", None)
    if isinstance(traceback, str) and not record.exc_text:
        record.exc_text = traceback.rstrip("\n")
    return True


logger.addFilter(_show_traceback)
