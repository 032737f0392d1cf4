"""What a worker says of itself at its start: app, brokers, pool, queues and handlers."""

from __future__ import annotations

from collections.abc import Iterable

from kq import config
from kq.driver import Driver
from kq.router import Consumer


def announcement(app: str, drivers: Iterable[Driver], pool: str, consumers: Iterable[tuple[Consumer, str]]) -> str:
    """Return the text, without passwords.

    Args:
        app: The app's name.
        drivers: The brokers that it consumes from.
        pool: Where and how many handlers run.
        consumers: Each with the name of its queue's driver.
    """
    lines = [f"kq worker of {app}"]
    lines += [f"  broker  {config.hide_password(d.url)}" + (f"  ({d.name})" if d.name else "") for d in drivers]
    lines += [f"  pool    {pool}", "  queues"]
    lines += [f"    {consumer.queue}  ->  {consumer.name}{_rules(consumer, driver)}" for consumer, driver in consumers]
    return "\n".join(lines)


def _rules(consumer: Consumer, driver: str) -> str:
    rules = [f"on {driver}"] if driver else []
    if consumer.is_async:
        rules.append("async")
    if consumer.timeout is not None:
        rules.append(f"timeout {consumer.timeout:g} s")
    if consumer.concurrency is not None:
        rules.append(f"at most {consumer.concurrency} at once")
    if consumer.auto_ack:
        rules.append("auto_ack: at most once")
    return f"  ({', '.join(rules)})" if rules else ""
