"""``kq worker``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from kq.cli.option import CONFIGURATION, DURATION, ConfigurationError, common, end, exit_code, fail, load
from kq.config import hide_password
from kq.errors import Error, Invalid


def _split(ctx: click.Context, param: click.Parameter, text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@click.command()
@click.argument("app", required=False, metavar="[APP]")
@click.option("-Q", "--queues", callback=_split, envvar="KQ_QUEUES", show_envvar=True, metavar="ID,ID",
              help="Queues to consume, separated by commas; default: all that have a handler.")  # fmt: skip
@click.option("-p", "--processes", type=click.IntRange(1, 512), envvar="KQ_PROCESSES", show_envvar=True,
              help="Child processes; default: one for each CPU.")  # fmt: skip
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), default=8, show_default=True,
              envvar="KQ_CONCURRENCY", show_envvar=True, help="Handlers at once in each child.")  # fmt: skip
@click.option("--pool", type=click.Choice(["processes", "threads"]), envvar="KQ_POOL", show_envvar=True,
              help="Where handlers run; default: processes.")  # fmt: skip
@click.option("--prefetch", type=click.IntRange(1, 1_000_000), envvar="KQ_PREFETCH", show_envvar=True,
              help="Messages in hand at most; default: as many as the handlers' pace asks for.")  # fmt: skip
@click.option("--grace", type=DURATION, default=30.0, show_default="30s", envvar="KQ_GRACE", show_envvar=True,
              help="How long handlers may go on after TERM.")  # fmt: skip
@click.option("--max-tasks-per-child", type=click.IntRange(1, 1_000_000_000), envvar="KQ_MAX_TASKS_PER_CHILD",
              show_envvar=True, help="Messages after which a child is replaced; default: never.")  # fmt: skip
@click.option("--connect-timeout", type=DURATION, default=10.0, show_default="10s", envvar="KQ_CONNECT_TIMEOUT",
              show_envvar=True, help="How long to try to reach the brokers at the start.")  # fmt: skip
@click.option("--burst", is_flag=True, envvar="KQ_BURST", show_envvar=True,
              help="Stop when the queues are empty.")  # fmt: skip
@click.option("-l", "--log-level", default="info", show_default=True, envvar="KQ_LOG_LEVEL", show_envvar=True,
              type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
              help="What to log.")  # fmt: skip
@click.option("--log-format", default="text", show_default=True, envvar="KQ_LOG_FORMAT", show_envvar=True,
              type=click.Choice(["text", "json"]), help="How to log.")  # fmt: skip
@common
def worker(
    app: str | None,
    app_path: str | None,
    broker: str | None,
    **given: Any,
) -> None:
    """Consume queues and run their handlers.

    APP is package.module:attribute; without it the configuration file says what to consume.

    TERM or INT stop the worker: what runs is finished within --grace, the rest goes back to its queue; a second
    signal gives it back at once. HUP reloads code and configuration; USR1 logs what runs where.
    """
    from kq import config_file
    from kq.worker.log import configure
    from kq.worker.option import WorkerOptions
    from kq.worker.pool import StartFailed
    from kq.worker.prefork import fill_standard_streams, prefork
    from kq.worker.prelude import Stopped, prelude
    from kq.worker.reload import start_anew
    from kq.worker.worker import Worker

    source = click.get_current_context().get_parameter_source
    is_file_named = source("config") is ParameterSource.COMMANDLINE
    # The variable is for who names neither.
    path = app or (None if is_file_named and source("app_path") is ParameterSource.ENVIRONMENT else app_path)
    file = config_file.find(None, os.environ)
    if path is None and file is None:
        raise click.UsageError(
            "name the app, as package.module:attribute, e.g. kq worker shop:app; "
            "or a configuration file that declares consumers, e.g. kq worker --config kq.yaml"
        )
    if file == config_file.DEFAULT:
        os.environ[config_file.FOUND] = os.path.abspath(file)
    fill_standard_streams()
    # Before the app's module can do so, and once more when it is known what its file says.
    configure(given["log_level"], given["log_format"], loaded=False)
    running: Worker | None = None
    try:
        with prelude() as signals, prefork(_forks(broker, given), given["concurrency"]) as forks:
            found = load(path, broker)
            try:
                unsaid, said = _unsaid(given), found.document.worker.values
                options = WorkerOptions(**{**given, **{name: said[name] for name in unsaid.intersection(said)}})
                found.declarations.load_handlers()
                configure(options.log_level, options.log_format, loaded=True)
                made = Worker(
                    found, app_path=path or "", options=options, forks=forks, in_file=unsaid, can_restart=True
                )
                signals.hand_over(made.reload)
                running = made
                running.run()
                signals.close_ears(restart=running.restart)
            except Invalid as error:
                raise ConfigurationError(error.message) from error
            except StartFailed as error:
                fail(f"no child could start: {error}", CONFIGURATION)
            except Error as error:
                if exit_code(error) == 1:
                    raise
                end(error)
            finally:
                found.close()
    except Stopped:
        # Or once more, when there is nothing left but to say goodbye.
        if running is None:
            logging.getLogger("kq.worker").info("stopped before it had begun", extra={"action": "stopped"})
        return
    if running is not None and running.restart:
        start_anew()


def _forks(broker: str | None, given: Mapping[str, Any]) -> int:
    """Return how many children to fork, as far as it is known yet how many there will be."""
    # This process's command line is each fork's, and what is secret in it is to be seen in no other place.
    if given["pool"] == "threads" or (broker is not None and hide_password(broker) != broker):
        return 0
    return given["processes"] or os.cpu_count() or 1


def _unsaid(given: Mapping[str, Any]) -> set[str]:
    """Return the options of which neither the command line nor the environment says anything."""
    source = click.get_current_context().get_parameter_source
    return {name for name in given if source(name) is ParameterSource.DEFAULT}
