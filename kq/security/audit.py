"""Denials: an error for the caller, and a line on the logger ``kq.audit`` for whoever watches.

A line is one JSON object in ASCII: a name with line breaks in it cannot forge another line. It never
holds a payload, a header's value or an actor's meta.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Final

from kq.errors import PermissionDenied
from kq.security.context import current_actor, decide
from kq.security.decision import Decision

#: Characters of an action or a resource in a line.
MAX_TEXT: Final = 512

_log = logging.getLogger("kq.audit")


def require(
    action: str, resource: str, meta: Mapping[str, Any] | None = None, *, strict: bool | None = None
) -> Decision:
    """Return the decision if the current actor may do ``action`` to ``resource``, else raise.

    A denial is logged on ``kq.audit`` as a warning.

    Args:
        action: What for, e.g. ``queue.publish.queue``.
        resource: On what, e.g. a queue id; may be empty.
        meta: The message's headers, or other facts that conditions read.
        strict: Whether a missing actor or scope denies; None: as the context or the process says.

    Raises:
        PermissionDenied: If not; ``details`` has ``action``, ``resource`` and ``actor`` (an id, or None).
        Invalid: If an argument is of another type.
    """
    decision = decide(action, resource, meta, strict=strict)
    if decision.allowed:
        return decision
    actor = current_actor()
    actor_id = None if actor is None else actor.id
    denied(actor_id, action, resource, decision)
    who = "a caller without an actor" if actor_id is None else f"actor {actor_id!r}"
    on = f" on {_shortened(resource)!r}" if resource else ""
    raise PermissionDenied(
        f"{_shortened(action)}{on} is denied to {who}: {decision.reason}",
        retryable=False,
        details={"action": action, "resource": resource, "actor": actor_id},
    )


def denied(actor_id: str | None, action: str, resource: str, decision: Decision) -> None:
    """Write the audit line of a denial."""
    _log.warning("%s", _Line(actor_id, action, resource, decision))


class _Line:
    """The text of a line, made only if somebody listens."""

    def __init__(self, actor_id: str | None, action: str, resource: str, decision: Decision) -> None:
        self._facts = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "event": "denied",
            "actor": actor_id,
            "action": _shortened(action),
            "resource": _shortened(resource),
            "policy": decision.policy,
            "reason": decision.reason,
        }

    def __str__(self) -> str:
        # Of the control characters JSON leaves only DEL as it is.
        return json.dumps(self._facts, ensure_ascii=True).replace("\x7f", "\\u007f")


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
