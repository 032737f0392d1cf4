"""What goes wrong with a SQLite file, as kq's errors."""

from __future__ import annotations

import sqlite3

from kq.backends.mapped import Mapped
from kq.backends.store import BrokerAway
from kq.errors import Error, Internal


class SQLiteErrors(Mapped):
    """What sqlite3 raises, as one of kq's errors.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def ours(self, error: BaseException) -> Error | None:
        """See `Mapped.ours`."""
        if isinstance(error, sqlite3.OperationalError):
            return self._failed(str(error))
        if isinstance(error, sqlite3.ProgrammingError):
            # By a signal's handler, or for a fork in one: nothing of the transaction is stored.
            return BrokerAway(f"{self._path}: closed in the middle of it: {error}", details={"reason": "unavailable"})
        if isinstance(error, sqlite3.DatabaseError):
            text = f"{self._path} is not a database kq can use: {error}"
            return BrokerAway(text, details={"reason": "refused"})
        return None

    def _failed(self, text: str) -> Error:
        if "full" in text:
            return Internal(f"{self._path}: no space left: {text}", details={"reason": "full"})
        if "locked" in text or "busy" in text:
            late = f"{self._path}: locked by another process for too long"
            return BrokerAway(late, details={"reason": "timeout"})
        return BrokerAway(f"{self._path}: {text}", details={"reason": "unavailable"})
