"""The secrets that sign and verify messages.

A keyring keeps no secret, only the state of HMAC-SHA256 after it: there is nothing that a repr, a log or a
traceback could show.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, NoReturn

from kq.errors import Invalid

#: Bytes of a secret, at least: as many as the hash has.
MIN_SECRET: Final = 32
#: What a key's id may be.
KEY_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")

_MAKE_ONE: Final = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'


class Keyring:
    """Secrets by key id: any of them verifies, one signs. Immutable and thread-safe.

    To rotate without a pause: add the new key everywhere, then sign with it, then take the old one away
    once what it signed has expired. Secrets are neither kept nor shown, and a keyring cannot be pickled.

    Args:
        keys: Secrets of at least 32 bytes by key id, 1 to 64 of ``A-Za-z0-9._-``; text is taken as UTF-8.
        sign_with: The id of the key that signs; None for a keyring that only verifies.

    Raises:
        Invalid: If an id, a secret or ``sign_with`` is not that. Never shows an id or a secret: they may be
            the wrong way round.
    """

    __slots__ = ("_macs", "_sign_with")

    def __init__(self, keys: Mapping[str, str | bytes], sign_with: str | None = None) -> None:
        if not isinstance(keys, Mapping) or not keys:
            got = "an empty one" if isinstance(keys, Mapping) else type(keys).__name__
            raise Invalid(f"signing keys: expected a mapping of key ids to secrets, got {got}; {_MAKE_ONE}")
        self._macs: dict[str, hmac.HMAC] = {}
        for place, (key_id, secret) in enumerate(keys.items(), 1):
            which = f"signing key {place} of {len(keys)}"
            if not isinstance(key_id, str) or not KEY_ID.fullmatch(key_id):
                raise Invalid(f"{which}: expected an id of 1 to 64 letters, digits, '.', '_' and '-', by its secret")
            self._macs[key_id] = hmac.new(_secret(secret, which), digestmod=sha256)
        if sign_with is not None and not (isinstance(sign_with, str) and sign_with in self._macs):
            raise Invalid(f"sign_with: expected the id of one of the {len(keys)} signing keys, got another value")
        self._sign_with = sign_with

    @property
    def sign_with(self) -> str | None:
        """The id of the key that signs, or None."""
        return self._sign_with

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of all keys."""
        return tuple(self._macs)

    def __repr__(self) -> str:
        signs = f"signs with {self.sign_with}" if self.sign_with else "verifies only"
        return f"<Keyring of {', '.join(self._macs)}; {signs}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a keyring cannot be pickled or copied: it holds secrets; make one where it is needed")

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._macs

    def marks(self) -> dict[str, str]:
        """Return by key id what tells one secret from another, and nothing else of it."""
        return {key_id: self.mac(key_id, b"kq mark\n").hex() for key_id in self._macs}

    def mac(self, key_id: str, data: bytes) -> bytes:
        """Return the MAC that a key makes of ``data``; raises ``KeyError`` if there is no such key."""
        # The state after the key is made once, and costs more than a short message.
        mac = self._macs[key_id].copy()
        mac.update(data)
        return mac.digest()


def _secret(secret: Any, which: str) -> bytes:
    try:
        raw = secret.encode() if isinstance(secret, str) else secret
    except UnicodeEncodeError:
        # Without its cause, which holds the text.
        raw = None
    if not isinstance(raw, bytes):
        got = type(secret).__name__
        raise Invalid(f"{which}: expected bytes, or text that UTF-8 can hold, as a secret; got {got}; {_MAKE_ONE}")
    if len(raw) < MIN_SECRET:
        raise Invalid(f"{which}: expected a secret of at least {MIN_SECRET} bytes, got {len(raw)}; {_MAKE_ONE}")
    return raw
