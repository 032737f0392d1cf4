"""Balances a history: what was lost, what ran twice, what nobody sent. Pure.

The checker is the total-queue checker of Jepsen (https://github.com/jepsen-io/jepsen, ``checker/total-queue``):
whatever went in must come out, and nothing else. To it comes a law of conservation, read from the broker when
all is at rest: messages that went in are done, dead, or still there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ledger:
    """What happened, as sets and multisets of ids.

    Attributes:
        attempted: What publishers began to publish.
        acked: What they were told is stored.
        started: What handlers began, with repetitions.
        done: What handlers finished, with repetitions.
        dead: What is in the dead-letter queue, with repetitions.
        waiting: How many messages the broker still holds: ready, delayed or leased.
    """

    attempted: frozenset[str]
    acked: frozenset[str]
    started: Counter[str]
    done: Counter[str]
    dead: Counter[str]
    waiting: int = 0

    @classmethod
    def of(
        cls, *, attempted: Iterable[str] = (), acked: Iterable[str] = (), started: Iterable[str] = (),
        done: Iterable[str] = (), dead: Iterable[str] = (), waiting: int = 0,
    ) -> Ledger:  # fmt: skip
        """Make a ledger of any iterables."""
        return cls(frozenset(attempted), frozenset(acked), Counter(started), Counter(done), Counter(dead), waiting)

    @property
    def ended(self) -> frozenset[str]:
        """What came to an end, good or bad."""
        return frozenset(self.done) | frozenset(self.dead)

    @property
    def lost(self) -> frozenset[str]:
        """What was stored, as the broker said, and has no end."""
        return self.acked - self.ended

    @property
    def false_confirmations(self) -> frozenset[str]:
        """What was stored, as the broker said, and was never seen again by anybody."""
        return self.lost - frozenset(self.started)

    @property
    def unexpected(self) -> frozenset[str]:
        """What came out and never went in."""
        return self.ended - self.attempted

    @property
    def recovered(self) -> frozenset[str]:
        """What came out although its publisher was never told that it is stored: allowed."""
        return self.ended - self.acked

    @property
    def duplicated(self) -> int:
        """How many handlers finished beyond one for each message."""
        return sum(count - 1 for count in self.done.values())

    @property
    def both(self) -> frozenset[str]:
        """What is done and also dead."""
        return frozenset(self.done) & frozenset(self.dead)

    @property
    def imbalance(self) -> int:
        """By how many messages the law of conservation is broken; 0 where it holds.

        Positive: too few came out; negative: too many are still there or came out.
        """
        return len(self.acked | self.recovered) - len(self.ended) - self.waiting
