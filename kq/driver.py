"""A broker and how to talk to it, as a value. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

from kq.errors import Error, Invalid

#: The name of the driver that is the app's own: that of ``broker=``, ``KQ_BROKER_URL`` or ``-b``.
MAIN: Final = ""

#: The least and the most seconds that a driver's durations may be.
_DURATIONS: Final[Mapping[str, tuple[float, float]]] = {
    "heartbeat": (1, 3600),
    "timeout": (0.001, 3600),
    "connect_timeout": (0.001, 3600),
    "reconnect_initial": (0.001, 3600),
    "reconnect_max": (0.001, 3600),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How a connection is encrypted, and how its ends know each other.

    Each of ``ca``, ``certificate`` and ``key`` is PEM text, or the path of a file that holds some.

    Attributes:
        ca: Who signs the broker's certificate; None for the system's authorities.
        certificate: Ours, where the broker asks for one.
        key: The private key of ours; never shown.
        key_password: What the key is encrypted with; never shown.
        server_name: The name that the broker's certificate must bear; None for the URL's host.
        verify: Whether the broker's certificate and name are checked.
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = field(default=None, repr=False)
    key_password: str | None = field(default=None, repr=False)
    server_name: str | None = None
    verify: bool = True


@dataclass(frozen=True, slots=True)
class Driver:
    """A broker and how to talk to it. Durations are seconds; None takes the app's setting or the default.

    Attributes:
        url: Where the broker is; never shown as it is, for it may hold a password.
        name: By which queues refer to it; `MAIN` for the app's own.
        virtual_host: RabbitMQ's virtual host, or Redis' database number, instead of the URL's.
        connection_name: What the broker's list of connections shows; None for the app's name.
        heartbeat: How often a silent connection is probed.
        timeout: How long a single call to the broker may take.
        connect_timeout: How long connecting may take.
        reconnect_initial: The first wait before trying again to reach a broker that is away.
        reconnect_max: The longest such wait.
        tls: For ``amqps`` and ``rediss``; None for the defaults, which verify.
    """

    url: str = field(repr=False)
    name: str = MAIN
    virtual_host: str | None = None
    connection_name: str | None = None
    heartbeat: float | None = None
    timeout: float | None = None
    connect_timeout: float | None = None
    reconnect_initial: float = 0.1
    reconnect_max: float = 2.0
    tls: Tls | None = None


def check(driver: Driver) -> None:
    """See to it that a driver's values are what they must be.

    Raises:
        Invalid: If one is not; the message names driver and value.
    """
    with naming(driver.name):
        if not isinstance(driver.url, str):
            raise Invalid(f"url: expected a broker's URL, got {type(driver.url).__name__}")
        address(driver)
        for name, (low, high) in _DURATIONS.items():
            value = getattr(driver, name)
            if value is None and not name.startswith("reconnect"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise Invalid(f"{name}: expected seconds from {low:g} to {high:,}, got {value!r}")
        if driver.reconnect_max < driver.reconnect_initial:
            raise Invalid(
                f"reconnect_max: expected at least reconnect_initial ({driver.reconnect_initial:g}), "
                f"got {driver.reconnect_max:g}"
            )


def address(driver: Driver) -> str:
    """Return a driver's URL, or several, with its virtual host or database number in the place of their own.

    Raises:
        Invalid: If it has a virtual host, and its kind of broker does not.
    """
    if driver.virtual_host is None:
        return driver.url
    scheme = driver.url.partition("://")[0]
    if scheme.lower() in ("memory", "sqlite"):
        raise Invalid(f"virtual_host: {scheme}:// has none; expected amqp:// or redis://")
    urls = driver.url.split(";") if scheme.lower() in ("amqp", "amqps") else [driver.url]
    return ";".join(_with_path(url, quote(driver.virtual_host, safe="")) for url in urls)


def _with_path(url: str, path: str) -> str:
    scheme, _, rest = url.partition("://")
    place, mark, query = rest.partition("?")
    return f"{scheme}://{place.partition('/')[0]}/{path}{mark}{query}"


@contextmanager
def naming(driver: str) -> Iterator[None]:
    """Have errors say which driver they are about, unless it is the app's own."""
    try:
        yield
    except Error as error:
        if driver == MAIN:
            raise
        text = f"driver {driver}: {error.message}"
        raise type(error)(text, kind=error.kind, retryable=error.retryable, details=error.details) from error
