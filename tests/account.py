"""Accounts of a test's own on the shared brokers, with a password that nobody else has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit
from uuid import uuid4

import amqp
import pytest
import redis

from tests.broker import Broker

#: Seconds that rabbitmqctl may take.
_PATIENCE = 60


@contextmanager
def account(broker: Broker, rules: Callable[[str], list[list[str]]] | None = None) -> Iterator[str]:
    """Make a user on a broker, and yield the broker's URL with its name and password.

    Args:
        broker: Redis or RabbitMQ.
        rules: Returns what the user of a name may do: rules of ``ACL SETUSER``, or configure, write and read
            as RabbitMQ's patterns; None for everything.
    """
    name, password = f"kqtest{uuid4().hex[:12]}", f"pw{uuid4().hex}"
    parts = urlsplit(broker.url)
    place = parts.netloc.rpartition("@")[2]
    url = parts._replace(netloc=f"{name}:{password}@{place}").geturl()
    if broker.name == "redis":
        with closing(redis.Redis.from_url(broker.url)) as client:
            for rule in rules(name) if rules else [["~*", "+@all", "&*"]]:
                client.execute_command(  # type: ignore[no-untyped-call]
                    "ACL", "SETUSER", name, "on", f">{password}", *rule
                )
            try:
                yield url
            finally:
                client.acl_deluser(name)
        return
    _rabbitmqctl("add_user", name, password)
    try:
        vhost = parts.path.lstrip("/") or "/"
        for rule in rules(name) if rules else [[".*", ".*", ".*"]]:
            _rabbitmqctl("set_permissions", "-p", vhost, name, *rule)
        _see_that_it_is_the_same_broker(url, vhost)
        yield url
    finally:
        _rabbitmqctl("delete_user", name)


def _rabbitmqctl(*arguments: str) -> None:
    if shutil.which("rabbitmqctl") is None:
        pytest.skip("no rabbitmqctl here: accounts are NOT TESTED on rabbitmq")
    done = subprocess.run(
        ["rabbitmqctl", "-q", *arguments], capture_output=True, text=True, timeout=_PATIENCE, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"rabbitmqctl is of no use here: accounts are NOT TESTED on rabbitmq: {done.stderr.strip()[:300]}")


def _see_that_it_is_the_same_broker(url: str, vhost: str) -> None:
    parts = urlsplit(url)
    connection = amqp.Connection(
        host=f"{parts.hostname}:{parts.port or 5672}", userid=parts.username, password=parts.password,
        virtual_host=vhost,
    )  # fmt: skip
    try:
        connection.connect()
    except amqp.exceptions.AccessRefused:
        pytest.skip("rabbitmqctl speaks to another broker: accounts are NOT TESTED on rabbitmq")
    finally:
        connection.close()
