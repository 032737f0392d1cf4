"""What kq raises: one class per kind, and whether a retry can help.

::

Error:
    ├── Invalid            INVALID             no retry   the caller's mistake
    ├── NotFound           NOT_FOUND           no retry
    ├── AlreadyExists      ALREADY_EXISTS      no retry
    ├── Conflict           CONFLICT            no retry   e.g. a queue declared with other values
    ├── PermissionDenied   PERMISSION_DENIED   no retry
    ├── Canceled           CANCELED            no retry
    ├── Unknown            UNKNOWN             no retry
    ├── Internal           INTERNAL            retry      e.g. the broker did not confirm
    ├── Unavailable        UNAVAILABLE         retry
    ├── Timeout            TIMEOUT             retry
    └── RateLimited        RATE_LIMITED        retry

Handlers raise these too: a retryable error sends the message back to its queue, any other one
sends it to the dead-letter queue. No exception of a broker's client library leaves kq.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

INVALID: Final = "INVALID"
NOT_FOUND: Final = "NOT_FOUND"
ALREADY_EXISTS: Final = "ALREADY_EXISTS"
CONFLICT: Final = "CONFLICT"
PERMISSION_DENIED: Final = "PERMISSION_DENIED"
CANCELED: Final = "CANCELED"
UNKNOWN: Final = "UNKNOWN"
INTERNAL: Final = "INTERNAL"
UNAVAILABLE: Final = "UNAVAILABLE"
TIMEOUT: Final = "TIMEOUT"
RATE_LIMITED: Final = "RATE_LIMITED"

#: Whether an error of a kind is worth a retry unless it says otherwise itself.
RETRYABLE: Final[Mapping[str, bool]] = {
    INVALID: False,
    NOT_FOUND: False,
    ALREADY_EXISTS: False,
    CONFLICT: False,
    PERMISSION_DENIED: False,
    CANCELED: False,
    UNKNOWN: False,
    INTERNAL: True,
    UNAVAILABLE: True,
    TIMEOUT: True,
    RATE_LIMITED: True,
}


class Error(Exception):
    """An error with a kind, and a word on whether trying again can help.

    Args:
        message: What went wrong: expected, got, and what to do.
        kind: One of the kinds above; a subclass brings its own.
        retryable: Whether trying again can help; None takes the kind's default.
        details: Facts for programs, e.g. ``{"reason": "full"}``; kept as a plain dict.

    Raises:
        ValueError: If ``kind`` is none of the kinds above.
    """

    default_kind: ClassVar[str] = UNKNOWN

    def __init__(
        self,
        message: str = "",
        *,
        kind: str | None = None,
        retryable: bool | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        # Another exception is often passed where its text is meant.
        self.message = message if isinstance(message, str) else str(message)
        super().__init__(self.message)
        self.kind = self.default_kind if kind is None else kind
        if self.kind not in RETRYABLE:
            raise ValueError(f"expected an error kind, one of {', '.join(RETRYABLE)}; got {kind!r}")
        self.retryable = RETRYABLE[self.kind] if retryable is None else bool(retryable)
        self.details: dict[str, Any] = dict(details or {})

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r}, kind={self.kind!r}, retryable={self.retryable})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (type(self), self.message, self.kind, self.retryable, self.details))


def _restore(cls: type[Error], message: str, kind: str, retryable: bool, details: dict[str, Any]) -> Error:
    """Rebuild a pickled error, so that errors cross process boundaries whole."""
    return cls(message, kind=kind, retryable=retryable, details=details)


class Invalid(Error):
    """The caller's input breaks a rule; the same input will break it again."""

    default_kind = INVALID


class NotFound(Error):
    """The queue, or the message, does not exist."""

    default_kind = NOT_FOUND


class AlreadyExists(Error):
    """The thing to be made is there already."""

    default_kind = ALREADY_EXISTS


class Conflict(Error):
    """Two declarations of one thing disagree; the message names the argument."""

    default_kind = CONFLICT


class PermissionDenied(Error):
    """A policy, or the broker's own access control, says no.

    ``details`` has ``action``, ``resource`` and ``actor`` where a policy does, and ``reason``, ``refused``, where the
    broker does.
    """

    default_kind = PERMISSION_DENIED


class Canceled(Error):
    """The work was called off."""

    default_kind = CANCELED


class Unknown(Error):
    """Nothing more is known."""

    default_kind = UNKNOWN


class Internal(Error):
    """Something failed that was not the caller's mistake.

    Publishing raises it when the broker did not confirm; ``details["reason"]`` is then one of
    ``unavailable``, ``timeout``, ``refused``, ``blocked``, ``unroutable`` and ``full``.
    """

    default_kind = INTERNAL


class Unavailable(Error):
    """A service is away for now."""

    default_kind = UNAVAILABLE


class Timeout(Error):
    """Something took longer than it was allowed to."""

    default_kind = TIMEOUT


class RateLimited(Error):
    """Too much at once; later is fine."""

    default_kind = RATE_LIMITED
