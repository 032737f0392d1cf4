"""Permissions: who may publish to, consume from and look after which queues.

::

    scope = Scope([
        Policy("orders", actions=["queue.publish", "queue.publish.queue"], resources="*",
               conditions=[{"field": "actor.meta.role", "operator": "in", "value": ["clerk", "admin"]}]),
    ])
    with context(Actor("user:17", {"role": "clerk"}), scope):
        can("queue.publish.queue", "app:orders")     # True

Any policy that denies denies; else any that allows allows; else it is denied. Everything here is
pure and knows no broker; producers, workers and commands ask it through ``require``.
"""

from __future__ import annotations

from kq.security.actor import Actor
from kq.security.audit import denied, require
from kq.security.condition import OPERATORS, Condition
from kq.security.context import can, context, current_actor, current_scope, current_strict, decide, set_strict
from kq.security.decision import Decision, Verdict
from kq.security.policy import EFFECTS, Policy
from kq.security.scope import Scope

__all__ = [
    "Actor",
    "Condition",
    "Policy",
    "Scope",
    "context",
    "current_actor",
    "current_scope",
    "current_strict",
    "set_strict",
    "can",
    "decide",
    "require",
    "denied",
    "Decision",
    "Verdict",
    "EFFECTS",
    "OPERATORS",
]
