"""``kq purge``."""

from __future__ import annotations

import click

from kq.cli.option import common, confirm, find_app


@click.command()
@click.argument("queue")
@click.option("--yes", is_flag=True, envvar="KQ_YES", show_envvar=True, help="Do not ask.")
@common
def purge(queue: str, yes: bool, app_path: str | None, broker: str | None) -> None:
    """Drop everything that waits in QUEUE. Messages that a worker holds are not touched."""
    with find_app(app_path, broker) as app:
        count = app.info(queue).message_count
        confirm(f"Drop {count} messages of {queue} for good?", yes)
        click.echo(f"{app.purge(queue)} dropped")
