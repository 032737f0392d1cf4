"""``kq check --acl``: what accounts on the broker need at least."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import click

from kq.backend import Granting, Role
from kq.errors import Invalid

if TYPE_CHECKING:
    from kq.backend import Backend


def show(backend: Backend, queues: list[str]) -> None:
    """Print the least rights of a publisher and of a worker. Nothing is connected.

    Args:
        backend: The broker's.
        queues: The ids of the queues to grant; none for all.

    Raises:
        Invalid: If the backend, a third party's, cannot tell.
    """
    if not isinstance(backend, Granting):
        raise Invalid(f"acl: the backend {type(backend).__name__} cannot tell what an account needs")
    for role in get_args(Role):
        click.echo(f"{backend.acl(role, queues)}\n")
