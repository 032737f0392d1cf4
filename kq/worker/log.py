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


_handler = logging.StreamHandler(sys.stderr)


def configure(level: str, style: str, *, loaded: bool) -> None:
    """Send logs to stderr, unless the program has arranged for them itself. May be called again.

    Args:
        level: A name that `logging` knows; where the program has arranged for its own logs, that of kq's.
        style: ``text`` or ``json``.
        loaded: Whether the program has been loaded. Before, only kq's own logs are sent, so that the program finds
            `logging` as it is without kq.
    """
    root, ours = logging.getLogger(), logging.getLogger("kq")
    # At debug level py-amqp tells of every heartbeat.
    logging.getLogger("amqp").setLevel(logging.WARNING)
    _handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    ours.setLevel(level.upper())
    if not loaded:
        ours.addHandler(_handler)
        return
    ours.removeHandler(_handler)
    for name, logger in list(root.manager.loggerDict.items()):
        # `logging.config` silences those that are there already, unless it is told not to.
        if isinstance(logger, logging.Logger) and (name == "kq" or name.startswith("kq.")):
            logger.disabled = False
    for handler in list(root.handlers):
        if _is_default(handler):
            root.removeHandler(handler)
    if not root.handlers:
        root.addHandler(_handler)
    if _handler in root.handlers:
        root.setLevel(level.upper())


def _is_default(handler: logging.Handler) -> bool:
    """Tell whether a handler is the one that a program gets which logs before anybody has arranged for it."""
    shape = getattr(handler.formatter, "_fmt", None)
    return type(handler) is logging.StreamHandler and handler.stream is sys.stderr and shape == logging.BASIC_FORMAT
