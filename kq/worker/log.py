"""Logs of the worker, for people or for programs, always on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone

#: What every log record has; anything else was given as ``extra``.
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


#: What would clear a terminal, or pass for something that it is not.
_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class TextFormatter(logging.Formatter):
    """A line for people: time, level, process, message. What has several lines, as a traceback, goes on indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s [%(process)d] %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines; only the first one begins at the margin, whatever strangers have written."""
        text = super().format(record)
        traceback = getattr(record, "traceback", None)
        if isinstance(traceback, str):
            text = f"{text}\n{traceback}"
        return text.rstrip("\n").translate(_CONTROL).replace("\n", "\n    ")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, pid, message, and whatever the record carries."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; line breaks in it are escaped."""
        fields = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        fields.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def configure(level: str, style: str) -> None:
    """Send logs to stderr, unless the program has arranged for them itself. May be called again.

    Args:
        level: A name that `logging` knows.
        style: ``text`` or ``json``.
    """
    root = logging.getLogger()
    root.setLevel(level.upper())
    # At debug level py-amqp tells of every heartbeat.
    logging.getLogger("amqp").setLevel(logging.WARNING)
    ours = [handler for handler in root.handlers if isinstance(handler.formatter, (TextFormatter, JsonFormatter))]
    if not root.handlers:
        ours = [logging.StreamHandler(sys.stderr)]
        root.addHandler(ours[0])
    for handler in ours:
        handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
