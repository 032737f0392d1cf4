"""A cache of bounded size that needs no lock."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Keeps about the most recently used values, at most twice ``capacity`` in weight.

    Two generations: a value goes into the young one; when that is full it becomes the old one, and
    the former old one is dropped. A value that is found among the old moves to the young.

    Safe to use from several threads without a lock: each step is one operation on a dict, and two
    threads that interfere can lose an entry or keep a few more, which costs a computation. They
    cannot mix up entries: a value is only ever stored under the key that it was computed for.

    Args:
        capacity: The weight of one generation.
    """

    __slots__ = ("_capacity", "_old", "_weight", "_young")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._young: dict[Hashable, tuple[Value, int]] = {}
        self._old: dict[Hashable, tuple[Value, int]] = {}
        self._weight = 0

    def get(self, key: Hashable) -> Value | None:
        """Return the value stored under ``key``, or None."""
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.get(key)
            if entry is None:
                return None
            self.put(key, *entry)
        return entry[0]

    def put(self, key: Hashable, value: Value, weight: int = 1) -> None:
        """Store a value; one that is heavier than the cache is not stored."""
        if weight > self._capacity:
            return
        if self._weight + weight > self._capacity:
            self._old, self._young, self._weight = self._young, {}, 0
        self._young[key] = (value, weight)
        self._weight += weight

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
