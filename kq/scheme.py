"""Which backend serves a broker URL, and opening it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Final
from urllib.parse import quote

from msgspec import structs

from kq import config, plugin
from kq.backend import Backend, BackendOptions
from kq.driver import Driver, address
from kq.errors import Internal, Invalid

#: Built in, so that a checkout works as it is and nothing is scanned at start.
BUILT_IN: Final[Mapping[str, str]] = {
    "memory": "kq.backends.stored:StoredBackend",
    "sqlite": "kq.backends.stored:StoredBackend",
    "redis": "kq.backends.stored:StoredBackend",
    "rediss": "kq.backends.stored:StoredBackend",
    "amqp": "kq.backends.rabbitmq:RabbitBackend",
    "amqps": "kq.backends.rabbitmq:RabbitBackend",
}


def find_backend(broker: str) -> str:
    """Return the ``module:class`` that serves a broker URL, without importing it.

    Raises:
        Invalid: If the URL has no scheme, or nothing is registered for it.
    """
    scheme = config.scheme(broker)
    if scheme in BUILT_IN:
        return BUILT_IN[scheme]
    found = plugin.backends()
    if scheme in found:
        return found[scheme]
    known = ", ".join(f"{name}://" for name in sorted({*BUILT_IN, *found}))
    raise Invalid(f"broker: no backend for {scheme}://; expected one of {known}")


def open_backend(settings: config.Settings, name: str, driver: Driver | None = None, folder: str = "") -> Backend:
    """Return a new backend for a broker, unconnected.

    Args:
        settings: What the driver does not say itself.
        name: Who connects, likewise.
        driver: The broker; None for that of the settings.
        folder: Where a relative path of an SQLite file starts; empty for the current directory.

    Raises:
        Invalid: If no backend is registered for its scheme, or the URL is ill-formed.
    """
    driver = Driver(settings.broker) if driver is None else driver
    target = find_backend(driver.url)
    scheme = config.scheme(driver.url)
    module, _, attribute = target.partition(":")
    try:
        factory: Callable[[str, BackendOptions], Backend] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Internal(f"broker: the backend for {scheme}:// does not load: {error}", retryable=False) from error
    options = BackendOptions(
        lease=settings.lease,
        heartbeat=settings.heartbeat if driver.heartbeat is None else driver.heartbeat,
        timeout=settings.publish_timeout if driver.timeout is None else driver.timeout,
        name=driver.connection_name or name,
        tls=driver.tls,
    )
    if driver.connect_timeout is not None:
        options = structs.replace(options, connect_timeout=driver.connect_timeout)
    url = address(driver)
    return factory(_rooted(url, folder) if scheme == "sqlite" else url, options)


def _rooted(url: str, folder: str) -> str:
    """Return the URL of an SQLite file with its path made absolute; what is ill-formed is left to be refused."""
    start, _, path = url.partition(":///")
    if not (folder and path) or path.startswith(("/", ":memory:")):
        return url
    return f"{start}:///{quote(folder.rstrip('/'))}/{path}"
