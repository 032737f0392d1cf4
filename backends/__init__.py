"""The backends: the only modules that import a broker's client.

Importing this package makes kq's own Kombu transports known to Kombu, for plain Kombu programs:
``kombu.Connection("kq-redis://localhost")``, ``kq-rediss://``, ``kq-sqlite:///file.db`` and
``kq-memory://name``.
"""

from __future__ import annotations

from kombu.transport import TRANSPORT_ALIASES

TRANSPORT_ALIASES.update(
    {f"kq-{scheme}": "kq.backends.virtual:Transport" for scheme in ("memory", "sqlite", "redis", "rediss")}
)
