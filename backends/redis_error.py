"""What redis-py raises, turned into kq's errors."""

from __future__ import annotations

from typing import Final

import redis
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from kq.backends.mapped import Mapped
from kq.backends.redis_tls import UnsafeConnection
from kq.backends.store import BrokerAway
from kq.errors import Error, Internal, PermissionDenied

#: What Redis says where the account may not: by a command, and, by version, from within a script.
_REFUSALS: Final = (
    "NOAUTH", "WRONGPASS", "NOPERM", "invalid password", "user executing the script can't", "ACL failure in script",
)  # fmt: skip


class RedisErrors(Mapped):
    """What redis-py raises.

    Args:
        shown: The server's URL, without its password.
        timeout: Seconds that a call may take.
    """

    def __init__(self, shown: str, timeout: float) -> None:
        self._shown = shown
        self._timeout = timeout

    def ours(self, error: BaseException) -> Error | None:
        """See `Mapped.ours`."""
        where = f"Redis at {self._shown}"
        if isinstance(error, (AuthenticationError, NoPermissionError)):
            return PermissionDenied(f"{where} refuses us: {error}", details={"reason": "refused"})
        if isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and "OOM" in str(error)):
            text = "Redis is full (maxmemory reached); free memory or raise the limit"
            return Internal(text, details={"reason": "full"})
        if isinstance(error, ReadOnlyError):
            return BrokerAway(f"{where} is read-only: {error}", details={"reason": "refused"})
        if isinstance(error, redis.exceptions.TimeoutError):
            return BrokerAway(f"{where} did not answer within {self._timeout:g} s", details={"reason": "timeout"})
        if isinstance(error, UnsafeConnection):
            return BrokerAway(f"{where}: {error}", details={"reason": "refused"})
        if isinstance(error, (redis.exceptions.ConnectionError, OSError)):
            return BrokerAway(f"{where} cannot be reached: {error}", details={"reason": "unavailable"})
        if isinstance(error, ResponseError):
            text = str(error)
            if any(sign in text for sign in _REFUSALS):
                return PermissionDenied(f"{where} refuses us: {text}", details={"reason": "refused"})
            return Internal(f"{where} refused a command: {text}", details={"reason": "refused"})
        if isinstance(error, redis.exceptions.RedisError):
            return Internal(f"{where} failed: {error}", details={"reason": "unavailable"})
        return None
