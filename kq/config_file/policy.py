"""Policies as files write them, made policies that can decide."""

from __future__ import annotations

from kq.config_file.document import Given
from kq.security import Policy


def policy(id: str, given: Given) -> Policy:
    """Return the policy that an entry describes.

    Raises:
        Invalid: If a pattern, a condition or an expression is ill-formed.
    """
    rule: Given = given.values["policy"]
    return Policy(
        id,
        actions=rule.values["actions"],
        resources=rule.values["resources"],
        effect=rule.get("effect", "allow"),
        conditions=[condition.values for condition in rule.get("conditions", ())],
        groups=given.get("groups", ()),
        expression=rule.get("expression"),
    )
