"""``kq check``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from msgspec import structs

from kq.cli.acl import show
from kq.cli.option import CONFIGURATION, ConfigurationError, common, fail, load, table, warn
from kq.config_file.kind import WORKER
from kq.entry import CONSUMER_OPTIONS
from kq.errors import Conflict, Error, Invalid
from kq.retry import Backoff

if TYPE_CHECKING:
    from kq.app import App
    from kq.config_file import Given
    from kq.driver import Driver
    from kq.registry import Registry


@click.command()
@click.option("--offline", is_flag=True, envvar="KQ_OFFLINE", show_envvar=True,
              help="Connect to nothing; print what is in force, and who says so.")  # fmt: skip
@click.option(
    "--schema",
    is_flag=True,
    envvar="KQ_SCHEMA",
    show_envvar=True,
    help="Print a JSON Schema of the configuration file, for editors.",
)
@click.option("--strict", is_flag=True, envvar="KQ_STRICT", show_envvar=True,
              help="Exit with 78 where there is something to warn of.")  # fmt: skip
@click.option("--acl", is_flag=True, envvar="KQ_ACL", show_envvar=True,
              help="Print the least rights of a publisher and of a worker; connect nothing.")  # fmt: skip
@common
def check(app_path: str | None, broker: str | None, offline: bool, schema: bool, strict: bool, acl: bool) -> None:
    """Reach the brokers, and say what they can do and which of their settings endanger messages."""
    from kq import config
    from kq.guard import pointless

    if schema:
        from kq.config_file.schema import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        return
    with load(app_path, broker) as app:
        try:
            app.declarations.load_handlers()
        except (Invalid, Conflict) as error:
            raise ConfigurationError(error.message) from error
        if acl:
            for driver in app.registry.drivers.values():
                _print_rights(app.registry, driver)
            return
        warnings = [*config.unknown_variables(named=app.registry.variables), *app.registry.risks]
        warnings += _worker_warnings(app, app_path or "")
        warnings += filter(None, map(pointless, app.registry.guard.policies))
        if offline:
            _print_configuration(app)
        else:
            for driver in app.registry.drivers.values():
                warnings += _check_driver(app.registry, driver)
    for warning in warnings:
        warn(warning)
    if not warnings:
        click.echo("the configuration is fine" if offline else "no unsafe settings found")
    elif strict:
        count = len(warnings)
        fail(f"{count} warning{'s' if count > 1 else ''}, and --strict lets none pass", CONFIGURATION)


def _print_rights(registry: Registry, driver: Driver) -> None:
    """Print what a publisher and a worker need to be allowed on a driver's broker."""
    if driver.name:
        click.echo(f"driver         {driver.name}")
    specs = [spec for spec in registry.queues() if spec.driver == driver.name]
    show(registry.backend(driver.name), [id for spec in specs for id in (spec.id, spec.dead_letter) if id is not None])


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
    for name, value in structs.asdict(backend.capabilities).items():
        shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        click.echo(f"{name.replace('_', ' '):22}{shown}")
    for spec in specs:
        note = ""
        if backend.capabilities.priorities == "declared" and not spec.max_priority:
            note = "  (priorities are carried, not acted on: no max_priority)"
        click.echo(f"queue          {spec.id}{note}")
    return [f"driver {driver.name}: {warning}" if driver.name else warning for warning in warnings]


def _print_configuration(app: App) -> None:
    """Print every value that is in force, with the place where it was said."""
    from kq import config

    settings = app.registry.settings
    click.echo(f"app      {app.name}")
    click.echo(f"files    {', '.join(app.document.paths) or 'none'}\n")
    rows: list[list[Any]] = []
    for name in config.DEFAULTS:
        value = getattr(settings, name)
        shown = config.hide_password(value) if name == "broker" else _show(value)
        rows.append([name, shown, settings.origins.get(name, "default")])
    rows += _worker_options(app.document.worker)
    table(["setting", "value", "from"], rows)
    for driver in app.registry.drivers.values():
        click.echo(f"\n{f'driver {driver.name}' if driver.name else 'driver of the app'}")
        rows = []
        for field, value in asdict(driver).items():
            name = field.replace("reconnect_", "reconnect.")
            # What is in there, by whatever name, may be a secret.
            shown = (
                config.hide_password(value) if name == "url" else "given" if name == "tls" and value else _show(value)
            )
            if name != "name":
                rows.append([name, shown, app.declarations.driver_origin(driver.name, field)])
        table(["field", "value", "from"], rows)
    for spec in app.registry.queues():
        click.echo()
        fields = {
            "codec": spec.codec, "dead_letter": spec.dead_letter, "max_attempts": spec.policy.max_attempts,
            "max_crashes": spec.policy.max_crashes, "retry": spec.policy.backoff, "max_length": spec.max_length,
            "max_priority": spec.max_priority, "require_signature": spec.require_signature,
            "driver": spec.driver or "the app's own", "options": spec.options,
        }  # fmt: skip
        rows = [[name, _show(value), app.declarations.origin(spec.id, name)] for name, value in fields.items()]
        click.echo(f"queue {spec.id}")
        table(["field", "value", "from"], rows)
        for consumer in app.registry.router.of(spec.id):
            click.echo(f"\nconsumer {consumer.name}  ({consumer.place})")
            rows = [
                [
                    "retry" if name == "backoff" else name,
                    _show(getattr(consumer, name)),
                    app.declarations.consumer_origin(consumer, name),
                ]
                for name in CONSUMER_OPTIONS
            ]
            table(["field", "value", "from"], rows)
    click.echo()


def _worker_options(file: Given) -> list[list[Any]]:
    """Return what ``kq worker`` runs with unless its command line says otherwise."""
    rows: list[list[Any]] = []
    for field in WORKER.fields:
        variable = f"KQ_{field.name.upper()}"
        if said := os.environ.get(variable):
            rows.append([f"worker.{field.name}", said, variable])
        elif field.name in file.values:
            rows.append([f"worker.{field.name}", _show(file.values[field.name]), str(file.places[field.name])])
        else:
            rows.append([f"worker.{field.name}", field.default, "default"])
    return rows


def _worker_warnings(app: App, app_path: str) -> list[str]:
    """Return what ``kq worker`` would warn of before it works.

    Raises:
        click.BadParameter: If it cannot read one of its variables.
    """
    from kq.cli.worker import worker

    context = click.Context(worker, parent=click.get_current_context().find_root(), info_name="worker")
    given = dict(app.document.worker.values)
    options = {option.name: option for option in worker.params}
    for field in WORKER.fields:
        if said := os.environ.get(f"KQ_{field.name.upper()}"):
            given[field.name] = options[field.name].process_value(context, said)
    handled = {consumer.queue for consumer in app.registry.router}
    queues = given.pop("queues", None) or ()
    warnings = [f"worker: queue {queue} has no handler" for queue in queues if queue not in handled]
    chosen = handled.intersection(queues) if queues else handled
    if chosen:
        warnings += _why_not(app, app_path, {**given, "queues": sorted(chosen)})
    return warnings


def _why_not(app: App, app_path: str, options: Mapping[str, Any]) -> list[str]:
    """Return why ``kq worker`` would not start, as far as that can be told without a broker."""
    from kq.worker.option import WorkerOptions
    from kq.worker.worker import Worker

    try:
        worker = Worker(app, app_path=app_path, options=WorkerOptions(**options), quiet=True)
    except Error as error:
        return [f"worker: it would not start: {error.message}"]
    guard = app.registry.guard
    with guard.serving():
        reasons = {queue: guard.against_consuming(queue) for queue in options["queues"]}
    denials = [f"it may not consume {queue}: {reason}" for queue, reason in reasons.items() if reason]
    return [f"worker: {warning}" for warning in (*worker.warnings, *denials)]


def _show(value: Any) -> str:
    """Return a value as a file says it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}s"
    if isinstance(value, Backoff):
        return f"{{initial: {value.initial:g}s, factor: {value.factor:g}, max: {value.max:g}s, jitter: {value.jitter}}}"
    if value is None or value in ({}, (), ""):
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
