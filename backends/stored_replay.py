"""Sending dead letters of a store back to the queue that they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from kq.backends.store import PAGE, Entry, Move, Store, in_lots
from kq.envelope import Envelope, pack, unpack_or_wrap
from kq.errors import Error


class Replay:
    """One replay. What dies meanwhile is not part of it, so it comes to an end where they die again at once.

    Args:
        store: Where the letters are.
        dead: The queue that holds them; it may hold those of other queues.
        target: The queue that they go back to.
        revive: Returns a letter as it goes.
    """

    def __init__(self, store: Store, dead: str, target: str, revive: Callable[[Envelope], Envelope]) -> None:
        self._store = store
        self._dead = dead
        self._target = target
        self._revive = revive
        #: The ids that are to go; None for all.
        self._wanted: set[str] | None = None
        #: Those of them that were found.
        self._found: set[str] = set()
        #: What stays, and what could not be moved, which stays or has been taken: passed over when it is seen again.
        self._seen: set[str] = set()
        self._moved = 0

    def these(self, ids: Sequence[str]) -> int:
        """Send letters of some ids, and return how many that were; raises as `all`."""
        self._wanted = set(ids)
        self._move(self._store.look(self._dead, ids))
        self._wanted -= self._found
        # A stranger may have stored them under any other id.
        return self.all() if self._wanted else self._moved

    def all(self) -> int:
        """Send all, and return how many that were.

        Raises:
            Error: What the store says of one that it cannot move. Those before it are moved.
        """
        counts = self._store.counts(self._dead)
        # What dies meanwhile comes behind all of these.
        left = counts.ready + counts.delayed
        left_before = kept = 0
        while left > 0:
            page = self._store.browse(self._dead, PAGE, kept)
            if not page:
                if left == left_before:
                    break
                # Somebody has taken some of those that are passed over: once more from the beginning.
                left_before, kept = left, 0
                continue
            new = [(key, raw) for key, raw in page if key not in self._seen]
            kept += len(page) - len(new)
            del new[left:]
            left -= len(new)
            kept += self._move(new)
        return self._moved

    def _move(self, letters: Iterable[tuple[str, bytes]]) -> int:
        """Send those of these that are to go, and return how many stay."""
        stay: list[str] = []
        for lot in in_lots(self._moves(letters, stay)):
            answers = self._store.move(self._dead, self._target, lot)
            failed = next((answer for answer in answers if isinstance(answer, Error)), None)
            if failed is not None:
                raise failed
            self._moved += sum(answer is True for answer in answers)
            self._seen.update(move.id for move, answer in zip(lot, answers, strict=True) if not answer)
        self._seen.update(stay)
        return len(stay)

    def _moves(self, letters: Iterable[tuple[str, bytes]], stay: list[str]) -> Iterator[Move]:
        for key, raw in letters:
            envelope = unpack_or_wrap(raw, key)
            origin = envelope.headers.get("x_original_queue", self._target)
            if origin == self._target and (self._wanted is None or envelope.id in self._wanted):
                self._found.add(envelope.id)
                envelope = self._revive(envelope)
                yield Move(key, None, Entry(envelope.id, pack(envelope), envelope.priority))
            else:
                stay.append(key)
