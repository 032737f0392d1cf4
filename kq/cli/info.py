"""``kq info``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import click

from kq import limit
from kq.backend import QueueInfo
from kq.cli.option import common, end, find_app, table
from kq.errors import Error


@click.command()
@click.argument("queues", nargs=-1, metavar="[QUEUE...]")
@click.option("--json", "as_json", is_flag=True, envvar="KQ_JSON", show_envvar=True, help="Print a JSON list.")
@common
def info(queues: tuple[str, ...], as_json: bool, app_path: str | None, broker: str | None) -> None:
    """Show what queues hold: those named, or all of the app's (-A)."""
    app = find_app(app_path, broker)
    with app:
        ids = list(queues) or [spec.id for spec in app.registry.queues()]
        if not ids:
            raise click.UsageError("name a queue, or an app that declares some: kq info -A shop:app")
        found, failed = {}, []
        #: Drivers whose brokers are away: each of their queues would be waited for as long.
        away = set()
        for queue in ids:
            try:
                driver = app.registry.spec(limit.queue_id(queue)).driver
                if driver in away:
                    continue
                found[queue] = app.info(queue)
            except Error as error:
                failed.append(error)
                if error.details.get("reason") in ("unavailable", "timeout"):
                    away.add(driver)
        if failed and not found:
            raise failed[0]
    if as_json:
        click.echo(json.dumps([{"queue": queue, **asdict(counts)} for queue, counts in found.items()]))
    else:
        _show(found)
    # What there is has been said; of the rest why there is nothing.
    for more in failed[1:]:
        click.echo(f"kq: {more.message}", err=True)
    if failed:
        end(failed[0])


def _show(found: Mapping[str, QueueInfo]) -> None:
    table(
        ["queue", "messages", "ready", "delayed", "in flight", "dead", "consumers", "oldest"],
        [
            [
                queue,
                c.message_count,
                c.ready,
                c.delayed,
                c.in_flight,
                c.dead,
                c.consumer_count,
                None if c.oldest_age is None else f"{c.oldest_age:.0f} s",
            ]
            for queue, c in found.items()
        ],
    )
