"""Signing what an app publishes, and deciding whether to trust what arrives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kq import clock, limit
from kq.envelope import DEAD_EXPIRY, Envelope, clean
from kq.errors import Invalid
from kq.guard import Guard
from kq.keyring import Keyring
from kq.security import Actor, current_actor, current_scope
from kq.signature import HEADER, Signed, Unverified, sign, verify


class Signing:
    """Keys, and the rules under which messages are signed and checked. Immutable and thread-safe.

    To rotate keys without a pause: add the new one everywhere, then sign with it, then take the old one away
    once what it signed has expired.

    Args:
        keys: Secrets of at least 32 bytes by key id. Every one of them verifies.
        sign_with: The id of the key that signs; None for an app that only verifies.
        max_age: Seconds that a signature is good, counted from when the message is due; default 7 days.
        require: Whether unsigned messages are dead-lettered on every queue, not only on those that say so.
        replay_window: Seconds for which the ids of completed messages are remembered, so that a copy of one is
            told from a new one; where the broker can. Default 1 hour.

    Raises:
        Invalid: If a value is not what it must be; never shows a secret.
    """

    def __init__(
        self,
        keys: Mapping[str, str | bytes],
        sign_with: str | None = None,
        *,
        max_age: Any = 7 * 86400.0,
        require: bool = False,
        replay_window: Any = 3600.0,
    ) -> None:
        self._keyring = Keyring(keys, sign_with)
        self.max_age = limit.seconds("max_age", max_age)
        if self.max_age < 1:
            raise Invalid("max_age: expected at least 1 second")
        if not isinstance(require, bool):
            raise Invalid(f"require: expected true or false, got {require!r}")
        self.require = require
        self.replay_window = limit.seconds("replay_window", replay_window)

    @property
    def signs(self) -> bool:
        """Whether there is a key to sign with."""
        return self._keyring.sign_with is not None

    def fingerprint(self) -> str:
        """Return a text that is another one for other keys and other rules; holds no secret."""
        return repr([self, self._keyring.marks(), self.replay_window])

    def __repr__(self) -> str:
        return f"<Signing, {self._keyring!r}, max_age={self.max_age:g}, require={self.require}>"

    def sign(self, queue_id: str, envelope: Envelope, delay: float) -> str:
        """Return the signature of a message that the current actor publishes now.

        Args:
            queue_id: Where to.
            envelope: The message.
            delay: Seconds that it is held back.

        Raises:
            Invalid: If it cannot be signed.
        """
        actor, scope, now = current_actor(), current_scope(), clock.now()
        return sign(
            self._keyring,
            _signed(queue_id, envelope),
            issued_at=now,
            expires_at=now + delay + self.max_age,
            actor_id=None if actor is None else actor.id,
            actor_meta=None if actor is None else actor.meta,
            groups=() if actor is None or scope is None else sorted(scope.groups),
        )

    def revive(self, queue_id: str, letter: Envelope) -> Envelope:
        """Return a dead letter as it goes back to its queue, where its expiry no longer holds.

        The signature is made anew, in the name of whoever made the first one, if there is a key to sign with and
        the first one is right. So a letter that was dead-lettered as unverified stays what it was.
        """
        revived = clean(letter)
        if HEADER not in letter.headers or not self.signs:
            return revived
        try:
            claims = verify(self._keyring, letter.headers[HEADER], _signed(queue_id, letter, dead=True), now=None)
        except Unverified:
            return revived
        now = clock.now()
        revived.headers[HEADER] = sign(
            self._keyring,
            _signed(queue_id, revived),
            issued_at=now,
            expires_at=now + self.max_age,
            actor_id=claims.actor_id,
            actor_meta=claims.actor_meta,
            groups=claims.groups,
        )
        return revived

    def distrust(
        self,
        queue_id: str,
        envelope: Envelope,
        guard: Guard,
        *,
        replayed: bool = False,
        dead: bool = False,
        now: float | None = None,
    ) -> str:
        """Say why a message is not to be trusted, or nothing.

        Args:
            queue_id: The queue it was published to.
            envelope: The message.
            guard: Whether whoever signed it may publish there is asked anew, by the policies as they are here.
            replayed: Whether a message of its id has been completed before.
            dead: Whether it is a dead letter of that queue, whose expiry is written elsewhere.
            now: Seconds since the epoch, where it is not the present.
        """
        at = clock.now() if now is None else now
        signed = _signed(queue_id, envelope, dead=dead)
        try:
            claims = verify(self._keyring, envelope.headers.get(HEADER), signed, now=at)
        except Unverified as error:
            return str(error)
        if replayed:
            return "replayed: a message of this id has been completed already"
        if not guard.in_force:
            return ""
        headers = {key: value for key, value in envelope.headers.items() if not key.startswith("x_")}
        try:
            actor = None if claims.actor_id is None else Actor(claims.actor_id, claims.actor_meta)
            return guard.objection(actor, claims.groups, queue_id, headers)
        except Invalid as error:
            return f"signed by an actor, or for groups, that cannot be: {error.message}"


def _signed(queue_id: str, envelope: Envelope, *, dead: bool = False) -> Signed:
    headers = envelope.headers
    if dead and DEAD_EXPIRY in headers:
        headers = {**headers, "x_expires_at": headers[DEAD_EXPIRY]}
    return Signed(queue_id, envelope.id, headers, envelope.properties, envelope.body)
