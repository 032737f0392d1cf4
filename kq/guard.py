"""What an app asks its policies, and under whom it acts where nobody else does.

Publishing asks twice: whether the actor may publish at all, then whether to this queue. Consuming asks when a
worker or a puller starts, under the worker's own actor or the program's; looking after queues asks each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

from kq.errors import Conflict
from kq.security import Actor, Policy, Scope, context, current_actor, current_scope, decide, denied, require
from kq.security.policy import group_names
from kq.security.value import mutable

PUBLISH: Final = "queue.publish"
PUBLISH_QUEUE: Final = "queue.publish.queue"
CONSUME_QUEUE: Final = "queue.consume.queue"
ADMIN_QUEUE: Final = "queue.admin.queue"
#: What kq asks for; programs may ask for more with `kq.security.can`.
ACTIONS: Final = (PUBLISH, PUBLISH_QUEUE, CONSUME_QUEUE, ADMIN_QUEUE)

#: Scopes that are kept: signed messages name groups, and whoever forges one names many.
_SCOPES: Final = 256


def pointless(policy: Policy) -> str:
    """Say why a policy applies to nothing that kq asks for; empty where it may."""
    asked = [action for action in ACTIONS if any(pattern.matches(action) for pattern in policy.actions)]
    if not asked:
        actions = ", ".join(map(str, policy.actions))
        return f"policy {policy.name!r}: kq asks for no action {actions}; it asks for {', '.join(ACTIONS)}"
    if asked == [PUBLISH] and not policy.covers(PUBLISH, ""):
        return (
            f"policy {policy.name!r}: {PUBLISH} is asked for without a resource, which its resources do not cover; "
            f"expected resources '*', or the action {PUBLISH_QUEUE}"
        )
    return ""


class Guard:
    """Asks the policies of one app. Thread-safe.

    Args:
        policies: All of them, of whatever group.
        strict: Whether whoever acts without an actor or a scope is denied; None: as the context or the process says.
        actor: Under whom workers consume and handlers run; None for nobody.
        groups: The groups of that actor.

    Raises:
        Conflict: If two policies have one name.
    """

    def __init__(
        self,
        policies: Iterable[Policy] = (),
        *,
        strict: bool | None = False,
        actor: Actor | None = None,
        groups: str | Iterable[str] = (),
    ) -> None:
        self.policies = tuple(policies)
        self.strict = strict
        self.actor = actor
        self.groups = group_names(groups)
        names: set[str] = set()
        for policy in self.policies:
            if policy.name in names:
                raise Conflict(f"two policies are called {policy.name!r}; rename one, or say it in one place")
            names.add(policy.name)
        #: Whether there is anything to ask, or anybody to act as.
        self.in_force = bool(self.policies or strict or actor)
        self._scopes: dict[frozenset[str], Scope] = {}

    def fingerprint(self) -> str:
        """Return a text that is another one where another decision can be made."""
        rules = [
            [repr(policy), *map(str, policy.tests), *sorted(policy.groups)]
            for policy in sorted(self.policies, key=lambda policy: policy.name)
        ]
        actor = None if self.actor is None else [self.actor.id, mutable(self.actor.meta)]
        return repr([rules, self.strict, actor, sorted(self.groups)])

    def serving_as(self, actor: Actor, groups: str | Iterable[str]) -> Guard:
        """Return a guard of the same policies, with another actor for workers and handlers."""
        return Guard(self.policies, strict=self.strict, actor=actor, groups=groups)

    def scope(self, groups: str | Iterable[str] = ()) -> Scope:
        """Return the app's policies as they are for members of some groups.

        Raises:
            Invalid: If a group's name is none.
        """
        key = group_names(groups)
        found = self._scopes.get(key)
        if found is None:
            if len(self._scopes) >= _SCOPES:
                self._scopes = {}
            found = self._scopes[key] = Scope(self.policies, groups=key)
        return found

    def acting(self, actor: Actor | None, groups: str | Iterable[str] = ()) -> AbstractContextManager[None]:
        """Return a context in which ``actor`` acts under the app's policies for some groups."""
        return context(actor, self.scope(groups), strict=self.strict)

    def serving(self) -> AbstractContextManager[None]:
        """Return the context in which workers consume and handlers run."""
        return self.acting(self.actor, self.groups)

    def publish(self, queue_id: str, headers: Mapping[str, Any]) -> None:
        """Ask whether the current actor may publish, and may publish here.

        Raises:
            PermissionDenied: If not; ``details["action"]`` says which of the two it was.
        """
        if self.strict is False and current_actor() is None:
            return
        self._require(PUBLISH, "", headers)
        self._require(PUBLISH_QUEUE, queue_id, headers)

    def consume(self, queue_id: str) -> None:
        """Ask whether the current actor may consume a queue.

        Raises:
            PermissionDenied: If not.
        """
        self._require(CONSUME_QUEUE, queue_id)

    def against_consuming(self, queue_id: str) -> str:
        """Say why the current actor may not consume a queue, or nothing if it may. Nobody tries: it is not audited."""
        decision = decide(CONSUME_QUEUE, queue_id, strict=self.strict)
        return "" if decision.allowed else decision.reason

    def administer(self, queue_id: str) -> None:
        """Ask whether the current actor may look into a queue, empty it, and deal with its dead letters.

        Raises:
            PermissionDenied: If not.
        """
        self._require(ADMIN_QUEUE, queue_id)

    def _require(self, action: str, resource: str, headers: Mapping[str, Any] | None = None) -> None:
        actor = current_actor()
        if actor is not None and self.policies and current_scope() is None:
            # Whoever names an actor and no scope has not said that the app's policies are not to count.
            with self.acting(actor):
                require(action, resource, headers, strict=self.strict)
        else:
            require(action, resource, headers, strict=self.strict)

    def objection(self, actor: Actor | None, groups: Iterable[str], queue_id: str, headers: Mapping[str, Any]) -> str:
        """Say why somebody else may not publish a message to a queue, or nothing if they may.

        A denial is logged on ``kq.audit``, as one of the present actor's is.

        Args:
            actor: Who published it.
            groups: The groups they acted in.
            queue_id: Where to.
            headers: The message's.

        Raises:
            Invalid: If a group's name is none.
        """
        with self.acting(actor, groups):
            for action, resource in ((PUBLISH, ""), (PUBLISH_QUEUE, queue_id)):
                decision = decide(action, resource, headers, strict=self.strict)
                if not decision.allowed:
                    denied(None if actor is None else actor.id, action, resource, decision)
                    who = "nobody" if actor is None else repr(actor.id)
                    return f"signed by {who}, who may not do {action} here: {decision.reason}"
        return ""
