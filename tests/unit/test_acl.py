from __future__ import annotations

import re
from pathlib import Path

import pytest

from kq.backend import Role
from kq.backends import rabbitmq_acl, redis, redis_acl, redis_script

QUEUES = ["shop:emails", "shop:emails.dead", "shop:a.b-c_d"]


def used(*scripts: str) -> set[str]:
    """Return the commands that scripts call, also in the functions that they share."""
    sources = map(redis_script.source, scripts)
    return {name.lower() for script in sources for name in re.findall(r"call\('([A-Z]+)'", script)}


def test_a_worker_gets_what_is_called_and_nothing_else() -> None:
    """The worker's commands are those of all scripts, and those that the store calls itself."""
    scripts = [value for name, value in vars(redis_script).items() if name[0].isupper() and isinstance(value, str)]
    scripts = [script for script in scripts if script is not redis_script.TOPOLOGY]
    direct = set(re.findall(r"self\._client\.(\w+)\(", Path(redis.__file__).read_text()))
    ours = direct - {"config_get", "eval", "evalsha", "hmget", "info", "ping", "pipeline"}
    assert set(redis_acl.WORKER) == (used(*scripts) | ours | {"blpop"}) - {"time"}


def test_a_publisher_gets_what_is_called_and_nothing_else() -> None:
    """The publisher's commands are those of declaring and publishing."""
    called = used(redis_script.DECLARE, redis_script.PUT, redis_script.PUT_PLAIN) - {"time"}
    assert {command for commands in redis_acl.PUBLISHER.values() for command in commands} == called | {"get"}


@pytest.mark.parametrize("role", ["publisher", "worker"])
def test_redis_grants_no_more_than_the_queues_named(role: Role) -> None:
    """Each key pattern of a rule starts with the tag of one of the queues."""
    words = redis_acl.rules(role, QUEUES)
    patterns = [word.strip("()") for word in words if word.strip("(").startswith("~")]
    assert patterns
    for pattern in patterns:
        assert pattern.startswith(("~{kq:shop:emails}", "~{kq:shop:a.b-c_d}"))
    assert not any("@all" in word or word in ("~*", "allkeys", "&*", "nopass") for word in words)


def test_rabbitmq_patterns_match_names_as_a_whole() -> None:
    """A worker's patterns match its queues, what kq makes for them, and nothing that looks like it."""
    narrow, wide = rabbitmq_acl.patterns("worker", QUEUES), rabbitmq_acl.patterns("worker", [])
    for name in [*QUEUES, "kq.delay.1000"]:
        assert all(re.search(pattern, name) for pattern in (*narrow, *wide))
    for name in ["shop:emailsx", "xshop:emails", "shop:aXb-c_d", "kqxdelay.1", "amq.topic", "", "kq.delay.x"]:
        assert not any(re.search(pattern, name) for pattern in narrow)
    for name in ["emails", "kq.delay.x", "amq.topic", "", "a:b c", "celery"]:
        assert not any(re.search(pattern, name) for pattern in wide)
    assert re.search(narrow.write, "amq.default")
    assert not re.search(narrow.read + "|" + narrow.configure, "amq.default")


def test_rabbitmq_publishers_reach_no_queue() -> None:
    """A publisher's patterns match no queue but those in which messages are delayed."""
    patterns = rabbitmq_acl.patterns("publisher", QUEUES)
    assert not any(re.search(pattern, queue) for pattern in patterns for queue in QUEUES)
    assert re.search(patterns.write, "amq.default")


@pytest.mark.parametrize(
    ("url", "vhost"),
    [
        ("amqp://h", "/"),
        ("amqp://h/", "/"),
        ("amqp://h/shop", "shop"),
        ("amqp://h/a%20b", "'a b'"),
    ],
)
def test_the_virtual_host_is_the_urls(url: str, vhost: str) -> None:
    """The command names the virtual host that kq connects to, and can be pasted into a shell."""
    assert f"set_permissions -p {vhost} kq-worker '" in rabbitmq_acl.acl("worker", [], url)
