"""Encrypted connections to brokers, with certificates that are right and wrong."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import monotonic, time
from typing import Any
from uuid import uuid4

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import kq
from kq import errors
from kq.backend import (
    Backend,
    BackendOptions,
    Delivery,
    Publication,
    QueueSpec,
    Settlement,
    UntrustedBroker,
)
from kq.backends.rabbitmq import RabbitBackend
from kq.backends.stored import StoredBackend
from kq.backends.tls_parameters import NOT_VERIFIED
from kq.driver import Tls
from kq.envelope import Envelope
from kq.outcome import DONE
from tests.broker import Broker
from tests.conformance.tls_proxy import TlsProxy

ON_THE_NETWORK = pytest.mark.parametrize("broker", ["redis", "rabbitmq"], indirect=True)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who signs certificates here."""
    return trustme.CA()


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    """Return a server's context with a certificate for some names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def pem(authority: trustme.CA) -> str:
    """Return an authority's certificate as text."""
    return authority.cert_pem.bytes().decode()


class Network:
    """Makes proxies before a broker, and backends that reach it through them."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.opened: list[Any] = []

    def proxy(self, context: ssl.SSLContext, host: str = "localhost") -> TlsProxy:
        proxy = TlsProxy(self.broker.url, context, host)
        self.opened.append(proxy)
        return proxy

    def backend(self, url: str, tls: Tls | None = None, **options: Any) -> Backend:
        made: type[StoredBackend | RabbitBackend] = StoredBackend if self.broker.stores else RabbitBackend
        values = {"lease": 10.0, "heartbeat": 10.0, "timeout": 10.0, "name": "tls", **options}
        backend = made(url, BackendOptions(tls=tls, **values))
        self.opened.insert(0, backend)
        return backend


@pytest.fixture
def network(broker: Broker) -> Iterator[Network]:
    """Encrypted ways to each broker in turn."""
    made = Network(broker)
    yield made
    for one in made.opened:
        one.close()


def assert_works(backend: Backend, broker: Broker, bodies: list[bytes] | None = None) -> None:
    """Publish, consume while waiting for it, and settle."""
    bodies = bodies or [b"1"]
    queue = QueueSpec(broker.queue_id("tls"), dead_letter=None)
    backend.declare(queue, create=True, exact=True)
    properties = {"content_type": "application/json", "timestamp": int(time())}
    batch = [Publication(queue, Envelope(uuid4().hex, {"x_kq": 1}, properties, body)) for body in bodies]
    feed = backend.feed([queue], 1000)
    try:
        assert backend.publish(batch, 10.0) == [None] * len(batch)
        found: list[Delivery] = []
        until = monotonic() + 15
        while len(found) < len(batch) and monotonic() < until:
            found += feed.fetch(1000, {})
            if len(found) < len(batch):
                feed.wait(1.0)
        assert {delivery.id for delivery in found} == {one.envelope.id for one in batch}
        assert feed.settle([Settlement(delivery, DONE) for delivery in found]) == ([], [])
    finally:
        feed.close()
    assert backend.info(queue).message_count == 0


def assert_refused(call: Callable[[], Any], *texts: str, within: float = 8.0) -> None:
    """See to it that a call fails soon, in our words, and says why."""
    started = monotonic()
    with pytest.raises(errors.Internal) as caught:
        call()
    assert monotonic() - started < within
    assert caught.value.details["reason"] in ("refused", "unavailable")
    for text in texts:
        assert text in caught.value.message
    assert caught.value.__cause__ is None


@ON_THE_NETWORK
def test_a_known_authority_is_trusted(network: Network, authority: trustme.CA, tmp_path: Path) -> None:
    """With the authority named, as text, as a file or in the URL, everything works, and nothing is warned of."""
    proxy = network.proxy(server_context(authority, "localhost"))
    file = tmp_path / "ca.pem"
    file.write_text(pem(authority))
    mark = "&" if "?" in proxy.url else "?"

    for backend in (
        network.backend(proxy.url, Tls(ca=pem(authority))),
        network.backend(proxy.url, Tls(ca=str(file))),
        network.backend(f"{proxy.url}{mark}tls_ca={file}"),
    ):
        assert_works(backend, network.broker)
        assert not [warning for warning in backend.check() if "TLS" in warning or "unencrypted" in warning]
    assert set(proxy.versions) <= {"TLSv1.2", "TLSv1.3"}
    assert proxy.versions


@ON_THE_NETWORK
def test_much_and_large_over_tls(network: Network, authority: trustme.CA) -> None:
    """Hundreds of messages and large ones come through, in records of any size."""
    proxy = network.proxy(server_context(authority, "localhost"))
    backend = network.backend(proxy.url, Tls(ca=pem(authority)))

    assert_works(backend, network.broker, [b"%d" % n for n in range(600)])
    assert_works(backend, network.broker, [b"x" * 2**20, b"1", b"y" * 70_000])


@ON_THE_NETWORK
def test_an_unknown_authority_is_refused(network: Network, authority: trustme.CA) -> None:
    """A broker whose authority nobody named gets neither password nor message, and the error says why."""
    proxy = network.proxy(server_context(authority, "localhost"))
    why = ("certificate verification failed", "tls.ca")
    for tls in (None, Tls(), Tls(ca=pem(trustme.CA()))):
        backend = network.backend(proxy.url, tls)
        assert_refused(backend.check, *why)
        assert_refused(partial(backend.feed, [QueueSpec("a:b")], 1), *why)
    assert proxy.versions == []


@ON_THE_NETWORK
def test_publishing_to_an_unknown_authority_fails(network: Network, authority: trustme.CA) -> None:
    """A publish says why it cannot be confirmed, and says it before its time is up."""
    proxy = network.proxy(server_context(authority, "localhost"))
    backend = network.backend(proxy.url)
    message = Publication(QueueSpec("a:b"), Envelope("id", {}, {}, b"1"))

    started = monotonic()
    try:
        (error,) = backend.publish([message], 10.0)
    except errors.Error as raised:
        error = raised

    assert isinstance(error, errors.Internal)
    assert "certificate verification failed" in error.message
    assert monotonic() - started < 5.0


@ON_THE_NETWORK
def test_a_worker_does_not_insist(network: Network, authority: trustme.CA) -> None:
    """What a certificate is, it will be in a moment as well: it ends at its start, and does not try for long."""
    proxy = network.proxy(server_context(authority, "localhost"))
    with kq.App("tls", broker=proxy.url) as app:
        app.consumer(network.broker.queue_id("tls"))(print)
        started = monotonic()
        with pytest.raises(UntrustedBroker, match="certificate verification failed") as caught:
            app.worker(connect_timeout=60).start()
        assert monotonic() - started < 8.0
    assert caught.value.details["reason"] == "refused"
    assert proxy.accepted <= 2


@ON_THE_NETWORK
def test_another_name_is_refused(network: Network, authority: trustme.CA) -> None:
    """A certificate for another host is refused, unless that name is the one expected."""
    proxy = network.proxy(server_context(authority, "broker.example"))
    for host in ("localhost", "127.0.0.1"):
        url = proxy.url.replace("@localhost:", f"@{host}:").replace("://localhost:", f"://{host}:")
        assert_refused(
            network.backend(url, Tls(ca=pem(authority))).check, "certificate verification failed", "tls.server_name"
        )
    assert proxy.versions == []

    assert_works(network.backend(proxy.url, Tls(ca=pem(authority), server_name="broker.example")), network.broker)


@ON_THE_NETWORK
def test_an_address_can_be_the_name(network: Network, authority: trustme.CA) -> None:
    """A certificate for an address holds for a URL with that address."""
    proxy = network.proxy(server_context(authority, "127.0.0.1"), host="127.0.0.1")

    assert_works(network.backend(proxy.url, Tls(ca=pem(authority))), network.broker)


@ON_THE_NETWORK
def test_not_to_verify_is_said_in_writing_and_warned_of(network: Network, authority: trustme.CA) -> None:
    """Verification can be switched off, in the URL or beside it, and every check warns of it."""
    proxy = network.proxy(server_context(authority, "broker.example"))
    mark = "&" if "?" in proxy.url else "?"

    for backend in (
        network.backend(proxy.url, Tls(verify=False)),
        network.backend(f"{proxy.url}{mark}tls_verify=false"),
    ):
        assert_works(backend, network.broker)
        assert backend.check().count(NOT_VERIFIED) == 1
        assert backend.check().count(NOT_VERIFIED) == 1


@ON_THE_NETWORK
@pytest.mark.parametrize(
    "query",
    ["ssl_cert_reqs=none", "ssl_check_hostname=false", "SSL_cert_reqs=none", "ssl=false", "ssl%5Fcert_reqs=none",
     "a=b&ssl_ca_certs=/dev/null"],
)  # fmt: skip
def test_the_clients_own_switches_are_refused(network: Network, authority: trustme.CA, query: str) -> None:
    """What the client would obey instead of us is refused before anything is connected."""
    proxy = network.proxy(server_context(authority, "broker.example"))
    with pytest.raises(errors.Invalid, match="tls_verify=false"):
        network.backend(f"{proxy.url}?{query}", Tls(ca=pem(authority)))
    assert proxy.versions == []


@ON_THE_NETWORK
def test_a_client_certificate(network: Network, authority: trustme.CA, tmp_path: Path) -> None:
    """A broker that asks for our certificate is shown it, given as text or as files; without, it refuses us."""
    context = server_context(authority, "localhost")
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    proxy = network.proxy(context)
    ours = authority.issue_cert("worker.example")
    certificate, key = ours.cert_chain_pems[0].bytes().decode(), ours.private_key_pem.bytes().decode()
    (tmp_path / "cert.pem").write_text(certificate)
    (tmp_path / "key.pem").write_text(key)
    (tmp_path / "both.pem").write_text(key + certificate)
    loaded = serialization.load_pem_private_key(key.encode(), None)
    locked = loaded.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"s3cret")
    ).decode()
    ca = pem(authority)

    for tls in (
        Tls(ca=ca, certificate=certificate, key=key),
        Tls(ca=ca, certificate=str(tmp_path / "cert.pem"), key=str(tmp_path / "key.pem")),
        Tls(ca=ca, certificate=str(tmp_path / "both.pem")),
        Tls(ca=ca, certificate=certificate, key=locked, key_password="s3cret"),
    ):
        assert_works(network.backend(proxy.url, tls), network.broker)
    assert_refused(network.backend(proxy.url, Tls(ca=ca)).check)


@ON_THE_NETWORK
def test_who_hangs_up_during_the_handshake_is_away(network: Network) -> None:
    """As a proxy whose broker is not there yet: that may pass in a moment, and is no certificate's fault."""
    over = Event()

    def hang_up(server: socket.socket) -> None:
        with suppress(OSError):
            while not over.is_set():
                client, _ = server.accept()
                with client:
                    client.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=hang_up, args=(server,))
        thread.start()
        scheme = "rediss" if network.broker.stores else "amqps"
        backend = network.backend(f"{scheme}://localhost:{server.getsockname()[1]}")
        with pytest.raises(errors.Internal) as caught:
            backend.check()
        over.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(20)
    assert not isinstance(caught.value, UntrustedBroker)
    assert caught.value.details["reason"] == "unavailable"


@ON_THE_NETWORK
def test_a_plain_server_is_no_tls_server(network: Network) -> None:
    """A server that does not speak TLS is refused with a word on it, or in time."""
    scheme, _, rest = network.broker.url.partition("://")
    backend = network.backend(f"{scheme}s://{rest}", connect_timeout=1.0)
    started = monotonic()
    with pytest.raises(errors.Internal, match=r"TLS|in time|answer|reached"):
        backend.check()
    assert monotonic() - started < 8.0


@pytest.mark.parametrize(
    # Plain Redis greets nobody: a connection that is accepted is made.
    ("broker", "scheme"), [("redis", "rediss"), ("rabbitmq", "amqp"), ("rabbitmq", "amqps")], indirect=["broker"]
)  # fmt: skip
def test_connecting_takes_no_longer_than_its_timeout(network: Network, scheme: str) -> None:
    """A server that accepts and then says nothing is given up after connect_timeout, whatever a call may take."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        backend = network.backend(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", connect_timeout=0.5, timeout=20.0)
        started = monotonic()
        with pytest.raises(errors.Internal) as caught:
            backend.check()
        assert caught.value.details["reason"] == "timeout"
        assert monotonic() - started < 3.0


@pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True)
def test_every_broker_of_several_is_verified(network: Network, authority: trustme.CA) -> None:
    """Where the first of several brokers is away, the next one's certificate and name are checked as well."""
    good = network.proxy(server_context(authority, "localhost"))
    bad = network.proxy(server_context(authority, "broker.example"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        away = f"amqps://guest:guest@localhost:{closed.getsockname()[1]}"

    assert_works(network.backend(f"{away};{good.url}", Tls(ca=pem(authority))), network.broker)
    assert_refused(
        network.backend(f"{away};{bad.url}", Tls(ca=pem(authority))).check, "certificate verification failed"
    )
    assert bad.versions == []
