"""A delivery in a worker's hands, and what a worker has seen of them so far."""

from __future__ import annotations

from collections import Counter

import msgspec

from kq.backend import Delivery

#: Unsettled deliveries in a row after which a message runs alone in its process.
_ALONE_AFTER = 2
#: Processes that have died before they started it, likewise: to receive a message takes memory, too.
_ABOARD = 3


class Flight(msgspec.Struct, eq=False):
    """A delivery in this worker's hands.

    Attributes:
        tag: Its number here.
        delivery: What arrived.
        suspected: Crashes in which it may have been the guilty one: several ran when a process died.
        held_up: Processes that were killed while it ran past its time limit, or another one did, and nobody could be
            told: one of them held up the others.
        aboard: Processes that have died by themselves before they started it, though it was given to them.
        settled: Whether it is settled already, while its handler still runs.
        consumer: Which of its queue's consumers it was given to last.
    """

    tag: int
    delivery: Delivery
    suspected: int = 0
    held_up: int = 0
    aboard: int = 0
    settled: bool = False
    consumer: int = 0

    @property
    def alone(self) -> bool:
        """Whether it runs with nothing beside it: it may take its process with it."""
        delivery = self.delivery
        return self.may_be_guilty or bool(self.held_up) or delivery.deliveries >= _ALONE_AFTER

    @property
    def may_be_guilty(self) -> bool:
        """Whether processes have died of it, as far as this worker knows."""
        return bool(self.suspected or self.delivery.crashes or self.is_near_deaths)

    @property
    def is_near_deaths(self) -> bool:
        """Whether so many processes have died before they started it that this may be why."""
        return self.aboard >= _ABOARD

    @property
    def is_hopeless(self) -> bool:
        """Whether it is given to nobody any more, though it has been acknowledged and can be charged with nothing."""
        return self.settled and self.aboard >= 2 * _ABOARD

    @property
    def lost(self) -> bool:
        """Whether it is not ours any more, and its end is not known: the broker gives it out again."""
        return self.delivery.lost and not self.settled


class Tally(msgspec.Struct):
    """What a supervisor has seen; for the summary at the end, and for tests."""

    handled: int = 0
    retried: int = 0
    dead: int = 0
    released: int = 0
    crashes: int = 0
    reasons: Counter[str] = msgspec.field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.handled} done, {self.retried} retried, {self.dead} dead-lettered, {self.released} released"
