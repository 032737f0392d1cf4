"""``kq check``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from kq.cli.option import common, find_app

if TYPE_CHECKING:
    from kq.driver import Driver
    from kq.registry import Registry


@click.command()
@common
def check(app_path: str | None, broker: str | None) -> None:
    """Reach the brokers, and say what they can do and which of their settings endanger messages."""
    from kq import config

    warnings = config.unknown_variables()
    with find_app(app_path, broker) as app:
        for driver in app.registry.drivers.values():
            warnings += _check_driver(app.registry, driver)
    for warning in warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    if not warnings:
        click.echo("no unsafe settings found")


def _check_driver(registry: Registry, driver: Driver) -> list[str]:
    """Reach a driver's broker, print what it can do and which queues live there, and return its warnings."""
    from kq import config
    from kq.driver import naming

    specs = [spec for spec in registry.queues() if spec.driver == driver.name]
    timeouts = [c.timeout for spec in specs for c in registry.router.of(spec.id) if c.timeout is not None]
    with naming(driver.name):
        backend = registry.backend(driver.name)
        warnings = backend.check(max(timeouts, default=None))
    if driver.name:
        click.echo(f"driver         {driver.name}")
    click.echo(f"broker         {config.hide_password(driver.url)}: reached")
    for name, value in asdict(backend.capabilities).items():
        shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        click.echo(f"{name.replace('_', ' '):22}{shown}")
    for spec in specs:
        note = ""
        if backend.capabilities.priorities == "declared" and not spec.max_priority:
            note = "  (priorities are carried, not acted on: no max_priority)"
        click.echo(f"queue          {spec.id}{note}")
    return [f"driver {driver.name}: {warning}" if driver.name else warning for warning in warnings]
