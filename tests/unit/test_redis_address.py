from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kq.backends.redis_address import Address, address_of
from kq.driver import Driver
from kq.driver import address as driver_address
from kq.errors import Invalid


def address(host: str = "localhost", port: int = 6379, database: int = 0, username: str | None = None,
            password: str | None = None) -> Address:  # fmt: skip
    return Address(host=host, port=port, database=database, username=username, password=password)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", address()),
        ("redis:///", address()),
        ("redis:///3", address(database=3)),
        ("redis://h", address("h")),
        ("rediss://h:1/2", address("h", 1, 2)),
        ("redis://[::1]:7/2/", address("::1", 7, 2)),
        ("redis://h/%32", address("h", database=2)),
        ("redis://h?db=3", address("h", database=3)),
        ("redis://h/3?db=3", address("h", database=3)),
        ("redis://:p%40s@h", address("h", password="p@s")),
        ("redis://u:p@h", address("h", username="u", password="p")),
        ("redis://u@h", address("h", username="u")),
        ("redis://h?username=u&password=p%26s", address("h", username="u", password="p&s")),
        ("redis://v:q@h?username=u&password=p", address("h", username="v", password="q")),
    ],
)
def test_what_a_url_says(url: str, expected: Address) -> None:
    assert address_of(url) == expected


@given(user=st.text(min_size=1), password=st.text(min_size=1), database=st.integers(0, 10**9 - 1))
def test_whatever_is_quoted_comes_out(user: str, password: str, database: int) -> None:
    url = f"redis://{quote(user, safe='')}:{quote(password, safe='')}@h:1/{database}"
    assert address_of(url) == address("h", 1, database, user, password)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h/x",
        "redis://h/1x",
        "redis://h/1/2",
        "redis://h:port",
        "redis://h:99999",
        "redis://[h",
        "redis://h?db=x",
        "redis://h?socket_timeout=1",
        "redis://h?s3cret",
        "redis://:s3cret?x@h",
        "redis://:s3cret@h/x",
        "redis://u:s3cret\ud800@h",
    ],
)
def test_what_a_url_must_not_say(url: str) -> None:
    """The error says what is expected, and shows no secret, nor what may be a piece of one."""
    with pytest.raises(Invalid, match=r"expected redis://\[user:password@\]host\[:port\]\[/db\]") as caught:
        address_of(url)
    assert "s3cret" not in caught.value.message.replace("redis://h?s3cret", "")
    assert caught.value.__cause__ is None


def test_two_databases_are_one_too_many() -> None:
    """Also where one of them is the driver's own."""
    with pytest.raises(Invalid, match="the database is given twice, as /1 and db=3; leave one out"):
        address_of("redis://h/1?db=3")
    with pytest.raises(Invalid, match="the database is given twice"):
        address_of(driver_address(Driver("redis://h?db=3", virtual_host="1")))


def test_an_address_does_not_show_its_password() -> None:
    assert repr(address_of("redis://u:s3cret@h/1")) == "<Address h:6379/1>"
