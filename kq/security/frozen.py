"""Objects that nobody can change once they are made."""

from __future__ import annotations

from typing import Any


class Frozen:
    """Refuses changes; what is cached about an object, or shared by threads, stays true.

    A subclass fills its slots with ``_put`` while it is being made.
    """

    __slots__ = ()

    def _put(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed; make a new one to change {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed; make a new one without {name}")

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self
