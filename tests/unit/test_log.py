from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from kq import failure_log
from kq.worker.log import JsonFormatter, TextFormatter


def record(message: str, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("kq.worker", logging.WARNING, "worker.py", 1, message, (), None)
    vars(made).update(extra)
    return made


def test_a_traceback_follows_its_line() -> None:
    """A failure's traceback stands below what is said of it, indented."""
    made = record("failed", traceback="Traceback\n  File x\nKeyError: 'id'\n")
    assert failure_log.logger.filter(made)
    lines = TextFormatter().format(made).splitlines()
    assert lines[0].endswith("] failed")
    assert lines[1:] == ["    Traceback", "      File x", "    KeyError: 'id'"]


@pytest.mark.parametrize("message", ["a\n12:00:00 ERROR forged", "a\r12:00:00 ERROR forged", "a\x1b[2Jb", "a\x85b"])
def test_only_the_first_line_begins_at_the_margin(message: str) -> None:
    """Line breaks of a stranger's do not look like records, and what moves a terminal's cursor is escaped."""
    first, *others = TextFormatter().format(record(message)).split("\n")
    assert first.isprintable()
    assert all(line.startswith("    ") for line in others)


def test_a_traceback_is_a_field() -> None:
    """For programs the traceback is a field of the record that tells of the failure."""
    line = JsonFormatter().format(record("failed", traceback="Traceback\n"))
    assert json.loads(line)["traceback"] == "Traceback\n"


def test_every_formatter_shows_a_traceback() -> None:
    """Those of the program know nothing of kq, and show it where they show that of an exception."""
    made = record("failed", traceback="Traceback\n  File x\nKeyError: 'id'\n")
    assert failure_log.logger.filter(made)
    assert logging.Formatter("%(message)s").format(made) == "failed\nTraceback\n  File x\nKeyError: 'id'"
