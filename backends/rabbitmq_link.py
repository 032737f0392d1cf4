"""One connection to RabbitMQ: opened, read, given up.

py-amqp revives a channel that the broker has closed in place, without its consumers and confirms. So no
link is used after an error: it is dropped, and the next use opens a new one.
"""

from __future__ import annotations

# Which looking an address up loads: not then, when a process may be forked in the middle of it.
import encodings.idna  # noqa: F401
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic
from typing import Any, Final

from amqp import spec
from amqp.exceptions import ChannelError, RecoverableConnectionError, error_for_code

from kq.backend import BackendOptions
from kq.backends.keepalive import keepalive
from kq.backends.rabbitmq_acknowledgement import acknowledgements, rejections
from kq.backends.rabbitmq_delivery import Deliveries, Receive
from kq.backends.rabbitmq_socket import PlainClient
from kq.backends.rabbitmq_tls import TlsClient
from kq.config import URL_HINT, hide_password
from kq.errors import Invalid
from kq.waker import Lookout

#: Milliseconds that sent data may stay unacknowledged before the kernel gives a connection up; py-amqp's
#: own default of one second kills connections that are merely slow.
_USER_TIMEOUT: Final = 30_000
#: Seconds that a farewell to the broker may take.
CLOSE_TIMEOUT: Final = 2.0
#: A frame: the connection is closed, as the broker wishes.
_CLOSED: Final = b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x33\xce"

#: Seconds that the opening of a connection is given even where its caller has less: 0 would mean forever.
LEAST_PATIENCE: Final = 0.1


class Link:
    """A connection and its channel.

    Args:
        url: Where to.
        options: Timeouts and the name to show.
        purpose: What the connection is for, to show.
        secured: How it is encrypted, as `rabbitmq_tls.secured` says; None if it is not.
        heartbeat: Seconds between heartbeats; 0 for none.
        patience: Seconds that a step of connecting may take.
        timeout: Seconds that a call may take; None for the options' own.

    Attributes:
        connection: py-amqp's connection, as Kombu made it.
        channel: Its channel; bodies arrive as the bytes they are.
        blocked: Why the broker takes no messages now, or empty.
    """

    def __init__(
        self, url: str, options: BackendOptions, *, purpose: str, heartbeat: float, secured: dict[str, Any] | None,
        patience: float = inf, timeout: float | None = None,
    ) -> None:  # fmt: skip
        self.blocked = ""
        self._deliveries = Deliveries()
        self._timeout = options.timeout if timeout is None else timeout
        settings = keepalive(options.heartbeat)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            settings[socket.TCP_USER_TIMEOUT] = _USER_TIMEOUT
        transport_options: dict[str, Any] = {
            "read_timeout": self._timeout,
            "write_timeout": self._timeout,
            "on_blocked": self._on_blocked,
            "on_unblocked": self._on_unblocked,
            "socket_settings": settings,
            "client_properties": {"connection_name": f"kq {options.name} {purpose}"},
            "frame_handler": self._deliveries.frame_handler,
        }
        connect_timeout = max(LEAST_PATIENCE, min(options.timeout, options.connect_timeout, patience))
        self._client: Any = None
        with suppress(ValueError, TypeError, KeyError):
            connection: Any = PlainClient if secured is None else TlsClient
            self._client = connection(
                url,
                ssl=secured or False,
                heartbeat=heartbeat,
                connect_timeout=connect_timeout,
                transport_options=transport_options,
            )
        if self._client is None:
            # Not chained, not even hidden: the original names pieces of the URL, and one may be the password.
            raise Invalid(
                f"broker: expected amqp://[user:password@]host[:port][/vhost], got {hide_password(url)!r}; {URL_HINT}"
            )
        # Tried again a little later, or elsewhere; not where a single broker has let us wait already.
        again_within = None if self._client.alt else connect_timeout / 2
        self._client.ensure_connection(
            max_retries=1,
            interval_start=options.reconnect_wait,
            reraise_as_library_errors=False,
            timeout=again_within,
        )
        self.connection: Any = self._client.connection
        try:
            self.channel: Any = self.connection.channel()
        except BaseException:
            self.close(wait=False)
            raise
        self.channel.auto_decode = False
        _leave_closed(self.channel)
        self.connection._x_close_ok = self._say_closed
        self._number = self.channel.channel_id
        self._looker: Any = None
        self._lookout = Lookout(self.connection.sock)

    @property
    def looker(self) -> Any:
        """A channel for looking into queues. Always the same: what it gives back, it finds again."""
        if self._looker is None:
            self._looker = self.open_channel()
            _leave_closed(self._looker)
        return self._looker

    @property
    def pending(self) -> bool:
        """Whether something has arrived and been read or decrypted already: `select` knows nothing of it."""
        transport = self.connection.transport
        return bool(transport.has_frame or transport.is_ahead)

    def _has_arrived(self, timeout: float) -> bool:
        """Wait for something more to read than the frames that have been read."""
        return self.connection.transport.is_ahead or bool(self._lookout.ready(timeout))

    def receive(self, consumer_tag: str, receive: Receive) -> None:
        """Have the deliveries of a subscription taken by ``receive``; say so before subscribing."""
        self._deliveries.receivers[self.channel.channel_id, consumer_tag] = receive

    def forget(self, consumer_tag: str) -> None:
        """Listen to a subscription that has ended no more."""
        self._deliveries.receivers.pop((self.channel.channel_id, consumer_tag), None)

    def open_channel(self) -> Any:
        """Return one more channel."""
        channel = self.connection.channel()
        channel.auto_decode = False
        return channel

    @contextmanager
    def brief_channel(self) -> Iterator[Any]:
        """One more channel for a moment. After an error it is not to be used again: most of them close it."""
        channel = self.open_channel()
        try:
            yield channel
        except ChannelError:
            # The broker has closed it, and py-amqp has opened it anew.
            channel.close()
            raise
        channel.close()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Have calls wait for their answers so long at most, all together; else they raise `TimeoutError`."""
        with self.connection.transport.having_limits(monotonic() + seconds, self._timeout):
            yield

    def write(self, frames: bytes, timeout: float) -> None:
        """Send frames that are made already.

        Raises:
            TimeoutError: If the broker does not take them within ``timeout`` seconds.
        """
        if not self.connection.connected:
            raise RecoverableConnectionError("connection already closed")
        self.connection.transport.write_within(frames, timeout)
        # By these py-amqp knows that no heartbeat is needed now.
        self.connection.bytes_sent += 1

    def write_now(self, frames: memoryview) -> int:
        """Send as much of frames as there is room for, wait for nothing, and return how much that was.

        Raises:
            OSError, amqp.AMQPError: If the connection breaks, or has.
        """
        if not self.connection.connected:
            raise RecoverableConnectionError("connection already closed")
        sent: int = self.connection.transport.write_now(frames)
        self.connection.bytes_sent += 1
        return sent

    def acknowledge(self, up_to: int, tags: Iterable[int]) -> None:
        """Acknowledge deliveries of the channel, within the time that a call may take; raises as `write`.

        Args:
            up_to: The tag up to which all are acknowledged; 0 for none.
            tags: Of others.
        """
        self.write(acknowledgements(self._number, up_to, tags), self._timeout)

    def give_back(self, tags: Iterable[int]) -> None:
        """Have deliveries of the channel put back into their queues; otherwise as `acknowledge`."""
        self.write(rejections(self._number, tags), self._timeout)

    def drain(self, timeout: float) -> bool:
        """Read until something is dispatched; False if nothing came within ``timeout`` seconds."""
        transport, dispatch = self.connection.transport, self.connection.on_inbound_frame
        until = monotonic() + timeout
        while True:
            while (frame := transport.take_frame()) is not None:
                if dispatch(frame):
                    return True
            if not self._has_arrived(until - monotonic()):
                return False
            with suppress(TimeoutError):
                transport.read_now()

    def drain_all(self) -> None:
        """Dispatch every frame that has arrived."""
        transport, dispatch = self.connection.transport, self.connection.on_inbound_frame
        more = True
        while True:
            while (frame := transport.take_frame()) is not None:
                dispatch(frame)
            if not more or not self._has_arrived(0.0):
                return
            try:
                more = transport.read_now()
            except TimeoutError:
                return

    def drain_now(self) -> None:
        """Read what there is, where something has arrived as far as one knows, and dispatch it; waits for nothing."""
        transport, dispatch = self.connection.transport, self.connection.on_inbound_frame
        more = True
        while more:
            try:
                more = transport.read_now()
            except TimeoutError:
                more = False
            while (frame := transport.take_frame()) is not None:
                dispatch(frame)

    def close(self, *, wait: bool = True) -> None:
        """Say goodbye, wait a moment for the answer, and drop the connection.

        The answer says that the acknowledgements sent before have been read: a socket that is closed with
        unread data in it takes them with it. A dead or blocked connection is not waited for long.

        Args:
            wait: Whether to say goodbye; else the connection is dropped at once.
        """
        connection = self.connection
        if wait and connection.connected:
            # Whatever still arrives, and whatever it raises: this connection is not read again.
            with suppress(Exception), connection.transport.having_timeout(CLOSE_TIMEOUT):
                connection.close()
        with suppress(Exception):
            connection.collect()

    def _say_closed(self) -> None:
        """Answer a broker that closes the connection, and wait for nothing; the socket stays until the link is closed.

        py-amqp closes it at once, which an event loop that watches it must not find.
        """
        transport = self.connection.transport
        with suppress(OSError):
            transport.write_now(_CLOSED)
        transport.connected = False

    def _on_blocked(self, reason: str) -> None:
        self.blocked = reason or "the broker does not say why"

    def _on_unblocked(self) -> None:
        self.blocked = ""


def _leave_closed(channel: Any) -> None:
    """Have a channel that the broker closes only say so: who waited until it is open anew might be an event loop.

    Nothing is done over the link after that.
    """

    def closed(code: int, text: str, class_id: int, method_id: int) -> None:
        raise error_for_code(code, text, (class_id, method_id), ChannelError)

    channel._callbacks[spec.Channel.Close] = closed
