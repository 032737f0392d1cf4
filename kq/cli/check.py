"""``kq check``."""

from __future__ import annotations

from dataclasses import asdict

import click

from kq.cli.acl import show
from kq.cli.option import common, find_app


@click.command()
@click.option("--acl", is_flag=True, help="Print the least rights of a publisher and of a worker; connect nothing.")
@common
def check(acl: bool, app_path: str | None, broker: str | None) -> None:
    """Reach the broker, and say what it can do and which of its settings endanger messages."""
    from kq import config

    with find_app(app_path, broker) as app:
        backend = app.registry.backend()
        if acl:
            specs = app.registry.queues()
            show(backend, [id for spec in specs for id in (spec.id, spec.dead_letter) if id is not None])
            return
        longest = max((c.timeout for c in app.registry.router if c.timeout is not None), default=None)
        warnings = [*config.unknown_variables(), *backend.check(longest)]
        click.echo(f"broker         {config.hide_password(app.registry.settings.broker)}: reached")
        for name, value in asdict(backend.capabilities).items():
            shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            click.echo(f"{name.replace('_', ' '):22}{shown}")
        for spec in app.registry.queues():
            note = ""
            if backend.capabilities.priorities == "declared" and not spec.max_priority:
                note = "  (priorities are carried, not acted on: no max_priority)"
            click.echo(f"queue          {spec.id}{note}")
    for warning in warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    if not warnings:
        click.echo("no unsafe settings found")
