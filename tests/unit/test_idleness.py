from __future__ import annotations

from kq.idleness import Idleness


class Looker:
    """One who is asked to look again."""

    def __init__(self, idleness: Idleness) -> None:
        self.asked = 0
        self.idleness = idleness
        idleness.add(self)

    def look(self) -> None:
        """Count how often it was asked."""
        self.asked += 1

    def finds_nothing(self) -> None:
        """Look, and find nothing."""
        self.idleness.found_nothing(self, self.idleness.begin(self))


def make() -> tuple[list[int], Idleness]:
    """Who counts how often all were idle."""
    idle: list[int] = []
    return idle, Idleness(lambda: idle.append(1))


def test_one_that_finds_nothing_is_idle() -> None:
    """With a single looker its word is enough."""
    idle, idleness = make()
    only = Looker(idleness)
    only.finds_nothing()
    assert idle == [1]
    assert only.asked == 0


def test_all_must_have_found_nothing() -> None:
    """Nobody is idle before all have looked; who has not is asked to."""
    idle, idleness = make()
    first, second = Looker(idleness), Looker(idleness)
    first.finds_nothing()
    assert (idle, first.asked, second.asked) == ([], 0, 1)
    second.finds_nothing()
    assert idle == [1]


def test_a_look_from_before_a_change_does_not_count() -> None:
    """A handler that has run since may have published to a queue that was empty then: it is looked into again."""
    idle, idleness = make()
    first, second = Looker(idleness), Looker(idleness)
    second.finds_nothing()
    idleness.changed()
    asked = second.asked
    first.finds_nothing()
    assert (idle, second.asked) == ([], asked + 1)
    second.finds_nothing()
    assert idle == [1]


def test_a_look_during_a_change_does_not_count() -> None:
    """A look counts as of its beginning; one that a change overtook is repeated."""
    idle, idleness = make()
    only = Looker(idleness)
    began = idleness.begin(only)
    idleness.changed()
    idleness.found_nothing(only, began)
    assert (idle, only.asked) == ([], 1)
    only.finds_nothing()
    assert idle == [1]


def test_who_looks_again_is_waited_for() -> None:
    """An earlier look that found nothing does not count while its looker looks once more."""
    idle, idleness = make()
    first, second = Looker(idleness), Looker(idleness)
    first.finds_nothing()
    idleness.begin(first)
    second.finds_nothing()
    assert idle == []
