"""The command line: ``kq worker | publish | info | dead | purge | check | policy``.

One module for each group of commands; `kq.cli.option` has what they share. Results go to stdout,
logs, progress and errors to stderr.
"""

from __future__ import annotations

import click

from kq.cli.check import check
from kq.cli.dead import dead
from kq.cli.info import info
from kq.cli.policy import policy
from kq.cli.publish import publish
from kq.cli.purge import purge
from kq.cli.worker import worker
from kq.version import __version__

_EPILOG = """\b
Examples:
  kq worker shop:app
  kq publish shop:emails '{"to": "a@example.com"}' -A shop:app -H priority=high
  KQ_BROKER_URL=redis://localhost kq info shop:emails
  kq dead list shop:emails

Exit codes: 0 fine, 1 failed, 2 usage, 69 broker unreachable, 77 refused, 78 configuration.
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, prog_name="kq")
def main() -> None:
    """Publish messages and run workers, on RabbitMQ, Redis, SQLite or memory."""


for command in (worker, publish, info, dead, purge, check, policy):
    main.add_command(command)
