"""What py-amqp and Kombu raise, turned into kq's errors."""

from __future__ import annotations

import ssl
from typing import Final

from amqp.exceptions import AccessRefused, AMQPError, NotAllowed, NotFound, PreconditionFailed, ResourceLocked
from kombu.exceptions import KombuError

from kq import errors
from kq.backend import UntrustedBroker
from kq.backends.mapped import Mapped
from kq.backends.rabbitmq_tls import UnsafeConnection
from kq.backends.tls import explain
from kq.config import hide_password
from kq.errors import Conflict, Error, Internal, PermissionDenied

#: What a broken connection raises, but for one more; see `_is_broken`.
_BROKEN: Final = (OSError, AMQPError, KombuError, EOFError)
_CLIENTS: Final = ("amqp", "kombu")


class RabbitErrors(Mapped):
    """What RabbitMQ's clients raise.

    Args:
        url: The broker's; shown without its password.
    """

    def __init__(self, url: str) -> None:
        self._where = f"RabbitMQ at {hide_password(url)}"

    def ours(self, error: BaseException) -> Error | None:
        """See `Mapped.ours`."""
        if isinstance(error, UnsafeConnection):
            return UntrustedBroker(f"{self._where}: {error}", details={"reason": "refused"})
        if isinstance(error, Error):
            return None
        if isinstance(error, NotAllowed) and "limit (" in _text(error):
            # Of connections, of the virtual host or of the user: the next moment may be another one.
            return away(f"{self._where} refuses us for now: {_text(error)}", "refused")
        if isinstance(error, (AccessRefused, NotAllowed)):
            return PermissionDenied(f"{self._where} refuses us: {_text(error)}", details={"reason": "refused"})
        if isinstance(error, NotFound):
            return errors.NotFound(_text(error))
        if isinstance(error, (PreconditionFailed, ResourceLocked)):
            return Conflict(_text(error))
        if isinstance(error, (TimeoutError, BlockingIOError)):
            return away(f"{self._where} did not answer in time", "timeout")
        if isinstance(error, ssl.SSLError):
            return away(f"{self._where}: {explain(error)}", "refused")
        if _is_broken(error):
            return away(f"{self._where} cannot be reached: {_text(error)}", "unavailable")
        return None


def _is_broken(error: BaseException) -> bool:
    if isinstance(error, AttributeError):
        # py-amqp takes the parts of a connection that has ended away from it, and still uses them.
        return error.obj is None or type(error.obj).__module__.partition(".")[0] in _CLIENTS
    return isinstance(error, _BROKEN)


def away(text: str, reason: str) -> Internal:
    """Return the error for a broker that does not do what it should."""
    return Internal(text, details={"reason": reason})


def _text(error: BaseException) -> str:
    return str(getattr(error, "reply_text", "") or error or type(error).__name__)
