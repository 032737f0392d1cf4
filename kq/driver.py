"""A broker and how to talk to it, as a value. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

#: The name of the driver that is the app's own: that of ``broker=``, ``KQ_BROKER_URL`` or ``-b``.
MAIN: Final = ""


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
