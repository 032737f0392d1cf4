"""Where a Redis server is, and as whom we sign in there, from a URL. Pure."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kq.config import URL_HINT, hide_password
from kq.errors import Invalid

_PORT: Final = 6379
_DATABASE: Final = re.compile(r"/?(\d{0,9})/?", re.ASCII)
#: What may stand behind the question mark, instead of before it.
_PARAMETERS: Final = ("username", "password", "db")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server is, and as whom we sign in there.

    Attributes:
        host: Its name or address.
        port: Its port.
        database: The number of the database.
        username: The account; None for the default one.
        password: Its password, never shown; None where it has none.
    """

    host: str
    port: int
    database: int
    username: str | None
    password: str | None

    def __repr__(self) -> str:
        return f"<Address {self.host}:{self.port}/{self.database}>"


def address_of(url: str) -> Address:
    """Return what a ``redis://`` or ``rediss://`` URL says, without kq's own parameters.

    Raises:
        Invalid: If it is ill-formed, or has a parameter that is none of ours.
    """
    try:
        # What is no text cannot be sent.
        url.encode()
        parts = urlsplit(url)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        path = _DATABASE.fullmatch(unquote(parts.path))
        database = _DATABASE.fullmatch(given.get("db", ""))
        if path is not None and database is not None and given.keys() <= set(_PARAMETERS):
            if path[1] and database[1] and path[1] != database[1]:
                raise Invalid(f"broker: the database is given twice, as /{path[1]} and db={database[1]}; leave one out")
            return Address(
                host=unquote(parts.hostname or "") or "localhost",
                port=_PORT if parts.port is None else parts.port,
                database=int(database[1] or path[1] or 0),
                username=unquote(parts.username or "") or given.get("username") or None,
                password=unquote(parts.password or "") or given.get("password") or None,
            )
    except ValueError:
        pass
    # Not chained, not even hidden: the original names pieces of the URL, and one may be the password. Nor is a
    # parameter named: a password that has an unquoted question mark looks like one.
    raise Invalid(
        "broker: expected redis://[user:password@]host[:port][/db], behind a question mark nothing but "
        f"{', '.join(_PARAMETERS)} and what begins with tls_, got {hide_password(url)!r}; {URL_HINT}"
    )
