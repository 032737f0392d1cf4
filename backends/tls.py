"""Encrypted connections: a `kq.driver.Tls` as an `ssl.SSLContext`, and what a URL may say of it.

The broker's certificate and name are checked unless somebody wrote that they are not to be: ``tls: {verify:
false}``, or ``?tls_verify=false`` at the end of a URL. The clients' own parameters for that (``ssl_cert_reqs``
and the like) are refused, for each client has its own idea of what they leave unchecked.

No error here shows what is in a certificate or a key, and a key is never in a file of ours that has a name.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kq.config import hide_password
from kq.driver import Tls
from kq.errors import Invalid

#: What a URL may say, by parameter, and the field that it stands for.
PARAMETERS: Final = {
    "tls_verify": "verify",
    "tls_ca": "ca",
    "tls_certificate": "certificate",
    "tls_key": "key",
    "tls_server_name": "server_name",
}
_SECURE: Final = ("amqps", "rediss")
_WORDS: Final = {"true": True, "yes": True, "on": True, "1": True,
                 "false": False, "no": False, "off": False, "0": False}  # fmt: skip

_PEM: Final = "-----BEGIN "
#: Bytes of a file of certificates; the authorities of a whole system are a quarter of that.
_MAX_SIZE: Final = 2**20
#: OpenSSL's number for a certificate that bears another name (X509_V_ERR_HOSTNAME_MISMATCH, and of an address).
_OTHER_NAME: Final = (62, 64)

NOT_VERIFIED: Final = (
    "TLS certificates are not verified (tls.verify is false): anybody on the way can read and alter messages"
)


def separate(url: str, tls: Tls | None) -> tuple[str, Tls | None]:
    """Return a URL without what is ours in it, for the client, and how its connections are encrypted.

    Args:
        url: The broker's; for RabbitMQ perhaps several, with semicolons between them.
        tls: What was said elsewhere.

    Returns:
        The URL, its scheme in small letters, and None where the connection is not encrypted.

    Raises:
        Invalid: If the URL is ill-formed, says what the broker's client would obey instead of us, or says what
            was said elsewhere too; or if something is said of TLS where there is none.
    """
    scheme = url.partition("://")[0].lower()
    urls = url.split(";") if scheme in ("amqp", "amqps") else [url]
    said: dict[str, Any] = {}
    kept = []
    for one in urls:
        head, mark, rest = one.partition("://")
        kept.append(_without_parameters(head.lower() + mark + rest, said))
    if scheme not in _SECURE:
        if said or tls is not None:
            what = next(iter(said), "tls")
            raise Invalid(f"broker: {what}: {hide_password(kept[0])} is not encrypted; expected amqps:// or rediss://")
        return ";".join(kept), None
    if any(not one.startswith(f"{scheme}://") for one in kept):
        raise Invalid(f"broker: expected {scheme}:// in each of several URLs, got {hide_password(url)!r}")
    made = tls or Tls()
    for parameter, value in said.items():
        field = PARAMETERS[parameter]
        if getattr(made, field) != getattr(Tls(), field):
            raise Invalid(f"broker: {parameter} in the URL and tls.{field} say the same; leave one of them out")
        made = replace(made, **{field: value})
    return ";".join(kept), made


def _without_parameters(url: str, said: dict[str, Any]) -> str:
    """Return a URL without our parameters, which go to ``said``."""
    parts = _parts(url)
    if parts is None:
        # Not chained, not even hidden: the original names pieces of the URL, and one may be the password.
        raise Invalid(
            f"broker: expected a URL such as {url.partition('://')[0]}://localhost, got {hide_password(url)!r}"
        )
    kept = []
    for piece in parts.query.split("&") if parts.query else []:
        name, value = next(iter(parse_qsl(piece, keep_blank_values=True)), ("", ""))
        if name.lower().startswith("ssl"):
            raise Invalid(
                f"broker: {name} in the URL is not taken: certificates are verified. Expected one of "
                f"{', '.join(PARAMETERS)}, or tls: in the configuration file; to verify nothing, "
                "write tls_verify=false or tls: {verify: false}"
            )
        if not name.startswith("tls_"):
            kept.append(piece)
        elif name not in PARAMETERS:
            raise Invalid(f"broker: unknown {name} in the URL; expected one of {', '.join(PARAMETERS)}")
        elif name == "tls_verify":
            if value.lower() not in _WORDS:
                raise Invalid(f"broker: tls_verify: expected true or false, got {value!r}")
            said[name] = _WORDS[value.lower()]
        elif not value or _PEM in value:
            expected = "a name" if name == "tls_server_name" else "the path of a PEM file"
            raise Invalid(f"broker: {name}: expected {expected} in the URL")
        else:
            said[name] = value
    if len(kept) == parts.query.count("&") + 1 or not parts.query:
        return url
    before, _, after = url.partition("?" + parts.query)
    return before + ("?" + "&".join(kept) if kept else "") + after


def _parts(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def context(tls: Tls) -> ssl.SSLContext:
    """Return what connections are encrypted with: TLS 1.2 or newer, verified unless ``tls`` says otherwise.

    Files are read now, and not again.

    Raises:
        Invalid: If a certificate or a key cannot be read, or is none; the message names field and file.
    """
    try:
        # Not even blank: for no data at all the system's authorities would be taken.
        made = ssl.create_default_context(cadata=None if tls.ca is None else _read("ca", tls.ca) or " ")
    except (ssl.SSLError, ValueError):
        raise Invalid(f"tls: ca: expected certificates in PEM, found none in {_place('ca', tls.ca)}") from None
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    if not tls.verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    if tls.certificate is not None:
        _identify(made, tls, tls.certificate)
    elif tls.key is not None:
        raise Invalid("tls: certificate: missing; expected the one that tls.key belongs to")
    return made


def _identify(made: ssl.SSLContext, tls: Tls, certificate: str) -> None:
    """Load our own certificate and its key."""
    # The key first: a certificate's file may hold another one, and the first is taken.
    pem = ("" if tls.key is None else _read("key", tls.key) + "\n") + _read("certificate", certificate)
    asked = False

    def password() -> str:
        # Without it OpenSSL would ask on the terminal.
        nonlocal asked
        asked = True
        return tls.key_password or ""

    at = _place("certificate", certificate)
    key_at = at if tls.key is None else _place("key", tls.key)
    if "PRIVATE KEY-----" not in pem:
        field = "certificate" if tls.key is None else "key"
        raise Invalid(f"tls: {field}: expected a private key in PEM, found none in {key_at}; give tls.key")
    try:
        with _unnamed_file(pem) as path:
            made.load_cert_chain(path, password=password)
    except (ssl.SSLError, ValueError, OSError) as error:
        if asked:
            problem = "does not open" if tls.key_password else "is missing, and the key is encrypted:"
            raise Invalid(f"tls: key_password: {problem} {key_at}") from None
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise Invalid(f"tls: key: {key_at} does not belong to the certificate in {at}") from None
        raise Invalid(f"tls: certificate: expected a certificate and its key in PEM, cannot load {at}") from None


def _read(field: str, value: str) -> str:
    """Return PEM text: the value itself, or what is in the file of that name."""
    if _PEM in value:
        return value
    try:
        with open(value, "rb") as file:
            data = file.read(_MAX_SIZE + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a path"
        raise Invalid(f"tls: {field}: cannot read {_place(field, value)}: {why}") from None
    if len(data) > _MAX_SIZE:
        raise Invalid(f"tls: {field}: {_place(field, value)} is larger than {_MAX_SIZE:,} bytes")
    # PEM is ASCII; comments around it need not be.
    return data.decode("ascii", "replace").replace("\N{REPLACEMENT CHARACTER}", "?")


def _place(field: str, value: str | None) -> str:
    """Return where a value is, to show. What may be a key without its first line is not taken for a path."""
    if value is None:
        return "the system's authorities"
    if _PEM in value:
        return "the text given"
    if field != "key" or "." in value:
        return repr(value[:200])
    try:
        return repr(value) if os.path.exists(value) else "what was given, which is neither PEM text nor a file"
    except ValueError:
        return "what was given"


@contextmanager
def _unnamed_file(text: str) -> Iterator[str]:
    """Yield a path by which OpenSSL can read a text; nobody else can, and nothing of it stays."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        number = os.memfd_create("kq-tls", os.MFD_CLOEXEC)
        with os.fdopen(number, "wb") as file:
            file.write(text.encode())
            file.flush()
            yield f"/proc/self/fd/{number}"
        return
    # Mode 0600, and gone as soon as it has been read.
    with tempfile.NamedTemporaryFile(prefix="kq-tls-") as named:
        named.write(text.encode())
        named.flush()
        yield named.name


def explain(error: ssl.SSLError) -> str:
    """Say why a handshake failed, and what to do about it where that can be told."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = (
            "set tls.server_name (tls_server_name in the URL) if that name is right"
            if error.verify_code in _OTHER_NAME
            else "name who signed it in tls.ca (tls_ca in the URL) if it is to be trusted"
        )
        return f"TLS certificate verification failed: {error.verify_message.rstrip('.')}; {hint}"
    return f"no TLS connection: {(error.reason or str(error)).replace('_', ' ').lower()}"


def warnings(url: str, tls: Tls | None) -> list[str]:
    """Return what is not safe about the way to a broker.

    Args:
        url: The broker's, without our parameters.
        tls: How it is encrypted, as `separate` says.
    """
    if tls is not None:
        return [] if tls.verify else [NOT_VERIFIED]
    found = []
    for one in url.split(";") if url.startswith("amqp://") else [url]:
        parts = urlsplit(one)
        given = dict(parse_qsl(parts.query))
        host = unquote(parts.hostname or "") or given.get("host", "localhost")
        if (parts.password or given.get("password")) and not _is_local(host):
            scheme = parts.scheme
            found.append(
                f"the password and all messages travel unencrypted to {host}: use {scheme}s:// instead of {scheme}://"
            )
    return found


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
