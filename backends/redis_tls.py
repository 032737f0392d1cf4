"""Encrypted connections of redis-py.

redis-py's own `SSLConnection` makes a context of its own from options that a URL may override, and checks no
host names before version 6. Ours takes a context that is ready.
"""

from __future__ import annotations

import ssl
from typing import Any

import redis

from kq.backends.tls import explain


class UnsafeConnection(redis.exceptions.RedisError):
    """No encrypted connection came about. Not among the errors that redis-py retries."""


class TlsConnection(redis.Connection):
    """A connection that is encrypted before anything is said.

    Args:
        tls_context: What with.
        tls_server_name: The name that the certificate must bear; None for the host's.
    """

    def __init__(self, *, tls_context: ssl.SSLContext, tls_server_name: str | None = None, **options: Any) -> None:
        self._tls_context = tls_context
        self._tls_server_name = tls_server_name
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> Any:
        plain: Any = super()._connect()  # type: ignore[no-untyped-call]
        try:
            # The handshake is a part of connecting.
            plain.settimeout(self.socket_connect_timeout)
            secure = self._tls_context.wrap_socket(plain, server_hostname=self._tls_server_name or self.host)
            secure.settimeout(self.socket_timeout)
        except TimeoutError:
            plain.close()
            raise
        except ssl.SSLError as error:
            plain.close()
            raise UnsafeConnection(explain(error)) from None
        except BaseException:
            plain.close()
            raise
        return secure
