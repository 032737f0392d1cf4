from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from kq import errors
from kq.backend import BackendOptions
from kq.backends.rabbitmq import RabbitBackend
from kq.backends.stored import StoredBackend
from kq.backends.tls import context
from kq.backends.tls_parameters import NOT_VERIFIED, PARAMETERS, separate, warnings
from kq.driver import Tls


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who signs certificates here."""
    return trustme.CA()


@pytest.fixture(scope="module")
def ours(authority: trustme.CA) -> tuple[str, str]:
    """A certificate and its key."""
    made = authority.issue_cert("worker.example")
    return made.cert_chain_pems[0].bytes().decode(), made.private_key_pem.bytes().decode()


def test_verified_by_default() -> None:
    """Chain and host name are checked, against the system's authorities, with TLS 1.2 at least."""
    made = context(Tls())
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert made.minimum_version >= ssl.TLSVersion.TLSv1_2
    expected = ssl.create_default_context()
    assert made.cert_store_stats() == expected.cert_store_stats()


def test_a_named_authority_is_the_only_one(authority: trustme.CA) -> None:
    """With an authority named, the system's are not asked."""
    made = context(Tls(ca=authority.cert_pem.bytes().decode()))
    assert made.cert_store_stats()["x509_ca"] == 1
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_not_verified_only_in_writing() -> None:
    """Verify=False, and nothing else, checks nothing."""
    made = context(Tls(verify=False))
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_NONE, False)
    assert made.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_no_file_of_ours_outlives_a_key(ours: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key given as text is in no file afterwards, and without memfd its file is for us alone while it lasts."""
    certificate, key = ours
    modes: list[int] = []
    load = ssl.SSLContext.load_cert_chain

    def watched(self: ssl.SSLContext, path: str, **options: object) -> None:
        modes.append(os.stat(path).st_mode & 0o777)
        load(self, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watched)
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    context(Tls(certificate=certificate, key=key))
    if before:
        assert set(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []

    monkeypatch.delattr(os, "memfd_create", raising=False)
    context(Tls(certificate=certificate, key=key))
    assert modes[-1] == 0o600
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_field_and_show_no_key(ours: tuple[str, str], authority: trustme.CA, tmp_path: Path) -> None:
    """What is wrong with a certificate or key is told by field and file; nothing of a key is in it."""
    certificate, key = ours
    other = authority.issue_cert("other.example").private_key_pem.bytes().decode()
    loaded = serialization.load_pem_private_key(key.encode(), None)
    locked = loaded.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"s3cret")
    ).decode()
    bare = "".join(key.splitlines()[1:-1])
    broken = key[:200] + "\n-----END PRIVATE KEY-----\n"
    missing = str(tmp_path / "missing.pem")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    large = tmp_path / "large.pem"
    large.write_bytes(b"x" * (2**20 + 1))
    cases = [
        (Tls(ca=missing), f"tls: ca: cannot read '{missing}': No such file"),
        (Tls(ca=str(tmp_path)), "tls: ca: cannot read"),
        (Tls(ca=str(empty)), f"tls: ca: expected certificates in PEM, found none in '{empty}'"),
        (Tls(ca=str(large)), "is larger than 1,048,576 bytes"),
        (Tls(ca="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"), "found none in the text given"),
        (Tls(ca="a\0b"), "tls: ca: cannot read"),
        (Tls(certificate=missing, key=key), f"tls: certificate: cannot read '{missing}'"),
        (Tls(certificate=certificate, key=missing), f"tls: key: cannot read '{missing}'"),
        (Tls(certificate=certificate), "tls: certificate: expected a private key in PEM"),
        (Tls(certificate=certificate, key=certificate), "tls: key: expected a private key in PEM"),
        (Tls(key=key), "tls: certificate: missing"),
        (Tls(certificate=certificate, key=other), "does not belong to the certificate in the text given"),
        (Tls(certificate=certificate, key=broken), "tls: certificate: expected a certificate and its key"),
        (Tls(certificate=certificate, key=bare), "neither PEM text nor a file"),
        # As a file in such a folder has it.
        (Tls(certificate=certificate, key=f"/etc/kq.d/{bare}"), "neither PEM text nor a file"),
        (Tls(certificate=certificate, key=locked), "tls: key_password: is missing"),
        (Tls(certificate=certificate, key=locked, key_password="wr0ng"), "tls: key_password: does not open"),
        (Tls(certificate=certificate, key=locked, key_password="x" * 5000), "tls: key_password: does not open"),
    ]
    secrets = {line for text in (key, other, locked) for line in text.splitlines() if not line.startswith("--")}
    for tls, expected in cases:
        with pytest.raises(errors.Invalid) as caught:
            context(tls)
        assert expected in caught.value.message
        assert not any(line in caught.value.message for line in (*secrets, "wr0ng", "x" * 20))
        assert caught.value.__cause__ is None
        assert not any(line in repr(tls) for line in secrets)


@pytest.mark.parametrize(
    ("url", "kept", "tls"),
    [
        ("rediss://h", "rediss://h", Tls()),
        ("REDISS://u:p@h/1", "rediss://u:p@h/1", Tls()),
        ("rediss://h?tls_verify=false", "rediss://h", Tls(verify=False)),
        ("rediss://h/0?a=1&tls_verify=No&db=2", "rediss://h/0?a=1&db=2", Tls(verify=False)),
        ("amqps://h/v?tls_ca=%2Fa%20b.pem", "amqps://h/v", Tls(ca="/a b.pem")),
        ("amqps://h?tls%5Fverify=off", "amqps://h", Tls(verify=False)),
        ("amqps://a;amqps://b?tls_server_name=c", "amqps://a;amqps://b", Tls(server_name="c")),
        ("rediss://h?tls_certificate=c.pem&tls_key=k.pem", "rediss://h", Tls(certificate="c.pem", key="k.pem")),
        ("redis://h?db=3", "redis://h?db=3", None),
        ("rediss://:a;b@h", "rediss://:a;b@h", Tls()),
        ("amqp://h//x", "amqp://h//x", None),
    ],
)
def test_what_a_url_says(url: str, kept: str, tls: Tls | None) -> None:
    """Our parameters are taken off the URL, and the rest of it stays as it was."""
    assert separate(url, None) == (kept, tls)


def test_a_url_adds_to_what_is_said_elsewhere() -> None:
    """The URL may say what nobody else has said, and not what somebody has."""
    assert separate("rediss://h?tls_verify=false", Tls(ca="x")) == ("rediss://h", Tls(ca="x", verify=False))
    with pytest.raises(errors.Invalid, match=r"tls_ca in the URL and tls\.ca say the same"):
        separate("rediss://h?tls_ca=y", Tls(ca="x"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rediss://h?ssl_cert_reqs=none", "ssl_cert_reqs in the URL is not taken"),
        ("redis://h?ssl_check_hostname=false", "ssl_check_hostname in the URL is not taken"),
        ("amqp://h?ssl=true", "ssl in the URL is not taken"),
        ("amqps://a;amqps://b?ssl_cert_reqs=none", "tls: {verify: false}"),
        ("rediss://h?tls_verify=maybe", "tls_verify: expected true or false, got 'maybe'"),
        ("rediss://h?tls_verify", "tls_verify: expected true or false, got ''"),
        ("rediss://h?tls_verfy=false", "unknown tls_verfy in the URL; expected one of tls_verify"),
        ("rediss://h?tls_ca=", "tls_ca: expected the path of a PEM file"),
        ("rediss://h?tls_key=-----BEGIN PRIVATE KEY-----s3cret", "tls_key: expected the path of a PEM file"),
        ("redis://h?tls_verify=false", "tls_verify: redis://h is not encrypted; expected amqps:// or rediss://"),
        ("amqp://u:s3cret@h?tls_ca=x", "tls_ca: amqp://u:**@h is not encrypted"),
        ("amqps://a;amqp://u:s3cret@b", "expected amqps:// in each of several URLs"),
        ("rediss://u:s3cret@[h", "expected a URL"),
        ("redis://u:s3cret@a..b", "expected a URL"),
        ("amqp://u:s3cret@a;amqp://" + 64 * "b", "expected a URL"),
    ],
)
def test_what_a_url_must_not_say(url: str, expected: str) -> None:
    """What would weaken a connection, or is misspelt, is refused, and shows no secret."""
    with pytest.raises(errors.Invalid) as caught:
        separate(url, None)
    assert expected in caught.value.message
    assert "s3cret" not in caught.value.message
    assert caught.value.__cause__ is None


@given(st.dictionaries(st.sampled_from(sorted(PARAMETERS)), st.just("true"), max_size=3), st.booleans())
def test_none_of_ours_reaches_the_client(parameters: dict[str, str], last: bool) -> None:
    """Whatever the order of parameters, the client sees only those that are its own."""
    pieces = [f"{name}={value}" for name, value in parameters.items()]
    pieces.insert(len(pieces) if last else 0, "db=2")
    kept, _ = separate("rediss://h/?" + "&".join(pieces), None)
    assert kept == "rediss://h/?db=2"


@pytest.mark.parametrize(
    ("url", "tls", "expected"),
    [
        ("rediss://u:p@h", Tls(), []),
        ("rediss://u:p@h", Tls(verify=False), [NOT_VERIFIED]),
        ("redis://u:p@h", None, ["unencrypted to h: use rediss://"]),
        ("redis://h?password=p", None, ["unencrypted to h: use rediss://"]),
        ("amqp://u:p@10.0.0.1/v", None, ["unencrypted to 10.0.0.1: use amqps://"]),
        ("amqp://u:p@localhost;amqp://u:p@far", None, ["unencrypted to far: use amqps://"]),
        ("redis://h", None, []),
        ("redis://:p@localhost", None, []),
        ("redis://:p@127.0.0.9", None, []),
        ("amqp://u:p@[::1]:5672", None, []),
        ("amqp://u:p@/v", None, []),
    ],
)
def test_warnings(url: str, tls: Tls | None, expected: list[str]) -> None:
    """What is not verified, and a password that travels in the clear beyond this machine, is warned of."""
    found = warnings(url, tls)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


@pytest.mark.parametrize("url", ["memory://x", "sqlite:///x.db", "redis://localhost", "amqp://localhost"])
def test_tls_where_there_is_none_is_refused(url: str) -> None:
    """Whoever configures TLS is told where there is no such thing, before anything is connected."""
    backend = RabbitBackend if url.startswith("amqp") else StoredBackend
    with pytest.raises(errors.Invalid, match="tls: "):
        backend(url, BackendOptions(30, 30, 10, "test", tls=Tls()))


@pytest.mark.parametrize("url", ["redis://h/x", "redis://h/1x", "redis://h:port", "redis://h?socket_timeout=x"])
def test_a_database_that_is_no_number_is_refused(url: str) -> None:
    """It is not taken for database 0."""
    with pytest.raises(errors.Invalid, match=r"expected (a URL such as )?redis://"):
        StoredBackend(url, BackendOptions(30, 30, 10, "test"))
