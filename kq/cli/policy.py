"""``kq policy test``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kq.cli.option import PAIR, REFUSED, common, find_app, pairs, table, warn

if TYPE_CHECKING:
    from kq.cli.option import Acting


@click.group()
def policy() -> None:
    """Ask the policies of an app or a configuration file."""


@policy.command()
@click.option(
    "--action", required=True, envvar="KQ_ACTION", show_envvar=True, help="What for, e.g. queue.publish.queue."
)
@click.option(
    "--resource",
    default="",
    envvar="KQ_RESOURCE",
    show_envvar=True,
    help="On what, e.g. a queue id; empty for queue.publish.",
)
@click.option(
    "--meta",
    multiple=True,
    type=PAIR,
    metavar="K=V",
    envvar="KQ_META",
    show_envvar=True,
    help="A header; K=V is text, K:=V is JSON.",
)
@common
def test(app_path: str | None, broker: str | None, action: str, resource: str, meta: tuple[str, ...]) -> None:
    """Explain a decision: what it is, and what each policy says that covers the request.

    Connects to nothing. Exits with 0 if it is allowed and with 77 if not.
    """
    from kq.guard import ACTIONS, PUBLISH, PUBLISH_QUEUE
    from kq.security.near_miss import did_you_mean

    with find_app(app_path, broker) as app:
        guard = app.registry.guard
        acting: Acting = click.get_current_context().obj
        if acting.actor is None:
            allowed = not guard.strict
            click.echo(f"{'allowed' if allowed else 'denied'}: there is no actor (--actor), and strict mode is "
                       f"{'on' if guard.strict else 'off'}")  # fmt: skip
            sys.exit(0 if allowed else REFUSED)
        if action not in ACTIONS:
            warn(f"kq itself never asks for {action}; it asks for {', '.join(ACTIONS)}{did_you_mean(action, ACTIONS)}")
        elif action == PUBLISH and resource:
            warn(f"kq asks for {PUBLISH} without a resource, and then for {PUBLISH_QUEUE} on the queue")
        decision = guard.scope(acting.groups).explain(acting.actor, action, resource, pairs("--meta", meta))
        click.echo(f"{'allowed' if decision.allowed else 'denied'}: {decision.reason}")
        if not decision.verdicts:
            click.echo(f"none of {len(guard.policies)} policies is about {action} on {resource!r}")
        else:
            click.echo()
            rows = [[v.policy, v.effect, "applies" if v.applies else "does not apply", v.reason]
                    for v in decision.verdicts]  # fmt: skip
            table(["policy", "effect", "here", "why"], rows, most=1000)
        sys.exit(0 if decision.allowed else REFUSED)
