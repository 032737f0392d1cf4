"""The command line: ``kq worker | publish | info | dead | purge | check | policy``.

One module for each command, or group of them, by its name; only that of the one that is run is loaded. `kq.cli.option`
has what they share. Results go to stdout, logs, progress and errors to stderr.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import click

from kq.version import __version__

_NAMES: Final = ("check", "dead", "info", "policy", "publish", "purge", "worker")

_EPILOG = """\b
Examples:
  kq worker shop:app
  kq publish shop:emails '{"to": "a@example.com"}' -A shop:app -H priority=high
  KQ_BROKER_URL=redis://localhost kq info shop:emails
  kq dead list shop:emails

Exit codes: 0 fine, 1 failed, 2 usage, 69 broker unreachable, 77 refused, 78 configuration.
"""


class _Commands(click.Group):
    """The commands, each loaded when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return list(_NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See `click.Group`."""
        if cmd_name not in _NAMES:
            return None
        found: Any = import_module(f"kq.cli.{cmd_name}")
        command: click.Command = getattr(found, cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, prog_name="kq")
def main() -> None:
    """Publish messages and run workers, on RabbitMQ, Redis, SQLite or memory."""
