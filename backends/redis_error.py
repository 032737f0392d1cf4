"""What goes wrong on Redis: as it is met, and as kq's errors."""

from __future__ import annotations

from typing import Final

from kq.backend import UntrustedBroker
from kq.backends.mapped import Mapped
from kq.backends.store import BrokerAway
from kq.errors import Error, Internal, PermissionDenied

#: Codes of errors, where the account may not, or nobody may from where we are.
_REFUSALS: Final = ("NOAUTH", "WRONGPASS", "NOPERM", "DENIED")
#: What such errors say whose code says nothing: by command, and, by the server's version, from within a script.
_SIGNS: Final = (
    "invalid password", "without any password configured", "user executing the script can't", "ACL failure in script",
)  # fmt: skip


class RedisError(Exception):
    """Any of them."""


class Broken(RedisError):
    """There is no connection: it is not made, or it broke, or the server serves nobody yet. Later it may go well."""


class Late(RedisError):
    """No answer, or no connection, in time."""


class Unsafe(RedisError):
    """No encrypted connection came about."""


class NoTransactions(RedisError):
    """The server has none, or not for this account."""


class Refusal(RedisError):
    """What the server answers where it does not do what it was asked.

    Args:
        text: All that it says.

    Attributes:
        code: The first word of it: what kind of refusal it is.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text.partition(" ")[0]


def is_full(error: Exception) -> bool:
    """Tell whether a server has no room for what it was asked to store."""
    # Within a script's error, by the server's version, stands the command's own.
    return isinstance(error, Refusal) and (error.code == "OOM" or "OOM command not allowed" in str(error))


def is_read_only(answer: object) -> bool:
    """Tell whether a server has answered that it is a replica, which is not to be written to."""
    return isinstance(answer, Refusal) and (answer.code == "READONLY" or "-READONLY" in str(answer))


def as_met(error: BaseException, late: str) -> BaseException:
    """Return what an error of a socket's is here, and any other as it is.

    Args:
        error: What was raised.
        late: What it is called where time was up.
    """
    if isinstance(error, TimeoutError):
        return Late(late)
    return Broken(str(error)) if isinstance(error, OSError) else error


class RedisErrors(Mapped):
    """What happened, as one of kq's errors; and the end of it, once the store is closed.

    Args:
        shown: The server's URL, without its password.

    Attributes:
        is_closed: Whether nothing is asked any more: who begins with something is told so.
    """

    def __init__(self, shown: str) -> None:
        self._where = f"Redis at {shown}"
        self.is_closed = False

    def __enter__(self) -> None:
        if self.is_closed:
            raise BrokerAway("the connection to Redis is closed", details={"reason": "unavailable"})

    def close(self) -> None:
        """Have nothing more asked."""
        self.is_closed = True

    def of(self, refusal: Refusal) -> Error:
        """Return kq's error for what the server has answered."""
        if is_full(refusal):
            full = "Redis is full (maxmemory reached); free memory or raise the limit"
            return Internal(full, details={"reason": "full"})
        if is_read_only(refusal):
            return BrokerAway(f"{self._where} is read-only: {refusal}", details={"reason": "refused"})
        return self._refused(refusal.code, str(refusal))

    def ours(self, error: BaseException) -> Error | None:
        """See `Mapped.ours`."""
        if isinstance(error, Refusal):
            return self.of(error)
        if isinstance(error, Late):
            return self.late(error)
        if isinstance(error, Unsafe):
            return UntrustedBroker(f"{self._where}: {error}", details={"reason": "refused"})
        if isinstance(error, (Broken, OSError)):
            return BrokerAway(f"{self._where} cannot be reached: {error}", details={"reason": "unavailable"})
        if isinstance(error, RedisError):
            return Internal(f"{self._where} failed: {error}", details={"reason": "unavailable"})
        return None

    def late(self, error: Late) -> Error:
        """Return kq's error for what was not answered in time."""
        return BrokerAway(f"{self._where}: {error}", details={"reason": "timeout"})

    def _refused(self, code: str, text: str) -> Error:
        if code in _REFUSALS or any(sign in text for sign in _SIGNS):
            return PermissionDenied(f"{self._where} refuses us: {text}", details={"reason": "refused"})
        return Internal(f"{self._where} refused a command: {text}", details={"reason": "refused"})
