"""Who is acting, under which policies: carried along by the context of threads, tasks and coroutines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakSet

from kq.errors import Invalid
from kq.security.actor import Actor
from kq.security.decision import Decision
from kq.security.scope import Scope

_actor: ContextVar[Actor | None] = ContextVar("kq_security_actor", default=None)
_scope: ContextVar[Scope | None] = ContextVar("kq_security_scope", default=None)
_strict: ContextVar[bool | None] = ContextVar("kq_security_strict", default=None)

#: What holds in this process where no context says otherwise; and the apps that make it strict while they are open.
_default_strict = False
_strict_apps = WeakSet[object]()

_MISSING: Final[Mapping[tuple[str, bool], Decision]] = {
    ("actor", True): Decision("deny", None, "there is no actor, which strict mode denies"),
    ("actor", False): Decision("allow", None, "there is no actor, and strict mode is off"),
    ("scope", True): Decision("deny", None, "there is no scope, which strict mode denies"),
    ("scope", False): Decision("allow", None, "there is no scope, and strict mode is off"),
}


@contextmanager
def context(actor: Actor | None, scope: Scope | None = None, *, strict: bool | None = None) -> Iterator[None]:
    """Act as ``actor`` under ``scope`` within a ``with`` block.

    Contexts nest, and the outer one is back at the end. Asyncio tasks and coroutines inherit the
    context; a thread does when it is started with a copied one (``contextvars.copy_context().run``,
    ``asyncio.to_thread``).

    Args:
        actor: Who acts; None for nobody.
        scope: The policies in force. None leaves those of the outer context, so that acting as
            somebody else never leaves the policies behind.
        strict: Whether a missing actor or scope denies; None leaves it as it is.

    Raises:
        Invalid: If ``actor`` is no Actor or ``scope`` no Scope.
    """
    if actor is not None and not isinstance(actor, Actor):
        raise Invalid(f"context: expected an Actor, got {type(actor).__name__}; e.g. kq.security.Actor('user:17')")
    if scope is not None and not isinstance(scope, Scope):
        raise Invalid(f"context: expected a Scope, got {type(scope).__name__}; e.g. kq.security.Scope(policies)")
    actors = _actor.set(actor)
    scopes = _scope.set(_scope.get() if scope is None else scope)
    stricts = _strict.set(_strict.get() if strict is None else strict)
    try:
        yield
    finally:
        _strict.reset(stricts)
        _scope.reset(scopes)
        _actor.reset(actors)


def current_actor() -> Actor | None:
    """Return who is acting, or None outside of any context."""
    return _actor.get()


def current_scope() -> Scope | None:
    """Return the policies in force, or None outside of any context."""
    return _scope.get()


def current_strict() -> bool:
    """Return whether a missing actor or scope denies: as the context says, else the process."""
    strict = _strict.get()
    return _default_strict or bool(_strict_apps) if strict is None else strict


def set_strict(strict: bool) -> None:
    """Set whether a missing actor or scope denies in this process, where no context says otherwise.

    Args:
        strict: Whether it does; false also takes back what apps have made of it.
    """
    global _default_strict
    _default_strict = bool(strict)
    if not strict:
        _strict_apps.clear()


def make_strict(app: object) -> None:
    """Have a missing actor or scope deny in this process until `leave_strict`, or the end of ``app``."""
    _strict_apps.add(app)


def leave_strict(app: object) -> None:
    """Take back what `make_strict` has done for ``app``; others, and the program, may have done it as well."""
    _strict_apps.discard(app)


def decide(
    action: str, resource: str, meta: Mapping[str, Any] | None = None, *, strict: bool | None = None
) -> Decision:
    """Return the decision for the current actor under the current scope.

    Only ``Decision.allowed`` allows: what is undefined is denied.

    Args:
        action: What for, e.g. ``queue.publish.queue``.
        resource: On what, e.g. a queue id; may be empty.
        meta: The message's headers, or other facts that conditions read.
        strict: Whether a missing actor or scope denies; it decides nothing else. None: as
            ``current_strict`` says.

    Raises:
        Invalid: If an argument is of another type.
    """
    actor, scope = _actor.get(), _scope.get()
    if actor is not None and scope is not None:
        return scope.decide(actor, action, resource, meta)
    strict = current_strict() if strict is None else bool(strict)
    return _MISSING["actor" if actor is None else "scope", strict]


def can(action: str, resource: str, meta: Mapping[str, Any] | None = None, *, strict: bool | None = None) -> bool:
    """Say whether the current actor may do ``action`` to ``resource``; as for ``decide``."""
    return decide(action, resource, meta, strict=strict).allowed
