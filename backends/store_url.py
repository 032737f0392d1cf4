"""From a URL to the store that it names."""

from __future__ import annotations

from kq.backend import BackendOptions
from kq.backends.store import Store
from kq.config import hide_password
from kq.errors import Invalid


def open_store(url: str, options: BackendOptions) -> Store:
    """Return an unconnected store for ``memory://``, ``sqlite://``, ``redis://`` or ``rediss://``.

    Raises:
        Invalid: If the URL is ill-formed.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme in ("memory", "sqlite") and options.tls is not None:
        raise Invalid(f"broker: tls: {scheme}:// has no connection to encrypt; leave tls out")
    if scheme == "memory":
        from kq.backends.memory import MemoryStore

        if not all(c.isalnum() or c in "._-" for c in rest):
            raise Invalid(f"broker: expected memory:// or memory://name, got {hide_password(url)!r}")
        return MemoryStore(rest)
    if scheme == "sqlite":
        from kq.backends.sqlite import SQLiteStore
        from kq.backends.sqlite_file import path_of

        return SQLiteStore(path_of(url), options.timeout)
    from kq.backends.redis import RedisStore

    return RedisStore(
        url,
        timeout=options.timeout,
        heartbeat=options.heartbeat,
        name=options.name,
        connect_timeout=options.connect_timeout,
        tls=options.tls,
    )
