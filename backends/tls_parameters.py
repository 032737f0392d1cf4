"""What a broker's URL says of encryption, and what is not safe about one. Pure.

The broker's certificate and name are checked unless somebody wrote that they are not to be: ``tls: {verify:
false}``, or ``?tls_verify=false`` at the end of a URL. The parameters of others for that (``ssl_cert_reqs`` and the
like) are refused, for each client has its own idea of what they leave unchecked.
"""

from __future__ import annotations

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
#: What certificates and keys begin with, where they are given as text.
PEM: Final = "-----BEGIN "
_SECURE: Final = ("amqps", "rediss")
_WORDS: Final = {"true": True, "yes": True, "on": True, "1": True,
                 "false": False, "no": False, "off": False, "0": False}  # fmt: skip

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
        elif not value or PEM in value:
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
    return parts if _may_be_a_host(unquote(parts.hostname or "localhost")) else None


def _may_be_a_host(name: str) -> bool:
    """Tell what Python cannot even look up: parts of a name have 1 to 63 characters (RFC 1035, section 2.3.4)."""
    return all(0 < len(label) < 64 for label in name.removesuffix(".").split("."))


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
    # A publisher without a password starts sooner without it.
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
