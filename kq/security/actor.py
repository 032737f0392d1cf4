"""Who asks: an id, and facts about it that conditions read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kq.errors import Invalid
from kq.security.frozen import Frozen
from kq.security.value import Uncacheable, cache_key, equal, immutable, mutable

#: Characters of an actor's id.
MAX_ID: Final = 256


class Actor(Frozen):
    """Who asks for something: a person, a service, a worker.

    Immutable and hashable; two actors with the same id and meta are equal. The repr shows the id
    only, because meta can hold personal data.

    Args:
        id: 1 to 256 printable characters, e.g. ``"user:17"``.
        meta: Facts about the actor, a mapping of JSON values; copied.

    Raises:
        Invalid: If the id is empty, too long or not printable, or meta holds no JSON values.
    """

    __slots__ = ("_hash", "id", "meta", "meta_keys")

    #: The id.
    id: str
    #: A read-only view of the facts; lists are tuples.
    meta: Mapping[str, Any]
    #: What a cache knows each fact by; None for one that is too large for that.
    meta_keys: Mapping[str, Any]
    _hash: int

    def __init__(self, id: str, meta: Mapping[str, Any] | None = None) -> None:
        # Line breaks and control characters would forge lines in logs.
        if not isinstance(id, str) or not 1 <= len(id) <= MAX_ID or not id.isprintable():
            raise Invalid(f"actor: expected an id of 1 to {MAX_ID} printable characters, got {_short(id)}")
        if meta is not None and not isinstance(meta, Mapping):
            raise Invalid(f"actor {id!r}: expected meta to be a mapping, got {type(meta).__name__}")
        # Not `str(id)`, for which an enum has another text.
        self._put(id=str.__str__(id))
        self._put(meta=immutable({} if meta is None else meta, f"meta of actor {id!r}"))
        self._put(meta_keys={key: _key(value) for key, value in self.meta.items()})
        self._put(_hash=hash((self.id, frozenset(self.meta))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Actor):
            return NotImplemented
        # Not ==: a fact that is True is another than one that is 1.
        return self.id == other.id and equal(self.meta, other.meta) is True

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Actor({self.id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Actor, (self.id, mutable(self.meta)))


def _key(value: Any) -> Any:
    try:
        return cache_key(value)
    except Uncacheable:
        return None


def _short(value: Any) -> str:
    if not isinstance(value, str):
        return f"a value of type {type(value).__name__}"
    return ascii(value) if len(value) <= 60 else f"{len(value)} characters"
