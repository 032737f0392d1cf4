"""Decisions, and what led to them."""

from __future__ import annotations

import msgspec


class Verdict(msgspec.Struct, frozen=True):
    """What one policy said.

    Attributes:
        policy: Its name.
        effect: ``allow`` or ``deny``.
        applies: Whether it counted.
        reason: Why it did or did not; names conditions, never the values of fields.
    """

    policy: str
    effect: str
    applies: bool
    reason: str


class Decision(msgspec.Struct, frozen=True):
    """The answer to a request.

    Attributes:
        result: ``allow``, ``deny``, or ``undefined``: no policy says anything, which denies.
        policy: The policy that decided, or None where none did.
        reason: Why, in words; never holds the values of fields.
        verdicts: What each policy said that covers the request; only where asked for (``Scope.explain``).
    """

    result: str
    policy: str | None
    reason: str
    verdicts: tuple[Verdict, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether the request may go on."""
        return self.result == "allow"


UNDEFINED = Decision("undefined", None, "no policy allows it")


def by(effect: str, policy: str) -> Decision:
    """Return the decision that a policy makes by its effect."""
    return Decision(effect, policy, f"policy {policy!r} {'denies' if effect == 'deny' else 'allows'} it")
