from __future__ import annotations

import pytest

from kq import errors
from kq.driver import MAIN, Driver, Tls, address, naming


def test_a_driver_shows_no_secret() -> None:
    """The URL and the key, which may hold passwords, are in no repr."""
    driver = Driver("amqp://a:canary@host", "a", tls=Tls(key="canary", key_password="canary"))
    assert "canary" not in repr(driver)


@pytest.mark.parametrize(
    ("url", "virtual_host", "expected"),
    [
        ("amqp://a:b@host:1/old?x=1", None, "amqp://a:b@host:1/old?x=1"),
        ("amqp://a:b@host:1/old?x=1", "new", "amqp://a:b@host:1/new?x=1"),
        ("amqp://host", "/", "amqp://host/%2F"),
        ("redis://host/0", "3", "redis://host/3"),
        ("amqp://a/old;amqp://b:1?x=1", "new", "amqp://a/new;amqp://b:1/new?x=1"),
    ],
)
def test_a_virtual_host_goes_into_the_url(url: str, virtual_host: str | None, expected: str) -> None:
    """The driver's virtual host, or database number, takes the place of the URL's."""
    assert address(Driver(url, "a", virtual_host=virtual_host)) == expected


def test_errors_name_the_driver() -> None:
    """An error on a driver says which, and is otherwise the same; on the app's own it is left as it is."""
    original = errors.Internal("away", retryable=False, details={"reason": "unavailable"})
    with pytest.raises(errors.Internal, match=r"^driver events: away$") as caught, naming("events"):
        raise original
    assert (caught.value.retryable, caught.value.details) == (False, {"reason": "unavailable"})
    with pytest.raises(errors.Internal) as caught, naming(MAIN):
        raise original
    assert caught.value is original
