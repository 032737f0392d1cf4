"""Encrypted connections: a `kq.driver.Tls` as an `ssl.SSLContext`, and why there is none.

No error here shows what is in a certificate or a key, and a key is never in a file of ours that has a name.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kq.backends.tls_parameters import PEM
from kq.driver import Tls
from kq.errors import Invalid

#: Bytes of a file of certificates; the authorities of a whole system are a quarter of that.
_MAX_SIZE: Final = 2**20
#: OpenSSL's number for a certificate that bears another name (X509_V_ERR_HOSTNAME_MISMATCH, and of an address).
_OTHER_NAME: Final = (62, 64)
#: What OpenSSL says of an answer that is no TLS.
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")


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
    if PEM in value:
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
    if PEM in value:
        return "the text given"
    # A path's last part may have a dot, base64 has none.
    if field != "key" or "." in os.path.basename(value):
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
    why = (error.reason or str(error)).replace("_", " ").lower()
    hint = "; does the server speak TLS on this port?" if error.reason in _NO_TLS else ""
    return f"no TLS connection: {why}{hint}"
