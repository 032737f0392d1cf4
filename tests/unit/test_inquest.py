"""Whom a process's end is charged to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from kq import errors
from kq.backend import Delivery
from kq.outcome import Death
from kq.retry import RetryPolicy
from kq.router import Consumer
from kq.worker.flight import Flight
from kq.worker.inquest import Finding, examine
from kq.worker.pool import Died, Place

CONSUMER = Consumer("handle", "app:q", lambda payload: payload, timeout=3.0)
POLICY = RetryPolicy(max_attempts=5)


def flights(count: int, settled: Iterable[int] = ()) -> list[Flight]:
    """Messages with numbers from 1 on."""
    made = [Flight(tag, Delivery("app:q", f"m-{tag}", b"", 0, 0, 0, None)) for tag in range(1, count + 1)]
    for tag in settled:
        made[tag - 1].settled = True
    return made


def died(
    running: Iterable[Flight], queued: Iterable[Flight] = (), late: Iterable[int] = (), held_up: Iterable[int] = ()
) -> Finding:
    """Have a process die of what it ran."""
    running, queued = list(running), list(queued)
    place = Place(1, 4, ready=True)
    tags = [flight.tag for flight in running], [flight.tag for flight in queued]
    death = Died(place, Death(exit_signal=9), "was killed", *tags, frozenset(late), frozenset(held_up))
    return examine(death, running, queued, lambda flight: (CONSUMER, POLICY))


def tags(found: Iterable[Flight]) -> list[int]:
    """Their numbers."""
    return [flight.tag for flight in found]


def test_one_that_ran_is_charged_and_those_behind_it_wait_again_in_order() -> None:
    one, *behind = flights(4)

    finding = died([one], behind)

    ((flight, outcome),) = finding.charged
    assert flight is one
    assert (outcome.action, outcome.attempts, outcome.crashes) == ("retry", 1, 1)
    assert outcome.failure is not None
    assert (outcome.failure.kind, outcome.failure.message) == (
        errors.INTERNAL,
        "the process that ran the handler was killed",
    )
    # Each goes before the one before it.
    assert tags(finding.again) == [4, 3, 2]
    assert [flight.aboard for flight in behind] == [1, 1, 1]
    assert (finding.over, finding.suspects, finding.held_up, finding.crashed) == ([], [], [], True)


def test_of_several_the_one_that_does_it_again_is_charged_for_both_times() -> None:
    culprit, other = both = flights(2)

    finding = died(both)

    assert (tags(finding.suspects), tags(finding.again), finding.charged) == ([1, 2], [1, 2], [])
    assert culprit.alone
    assert other.alone

    ((flight, outcome),) = died([culprit]).charged
    assert flight is culprit
    assert (outcome.attempts, outcome.crashes) == (2, 2)


def test_what_was_settled_before_is_over_and_hides_nobody() -> None:
    settled, other = flights(2, settled=[1])

    finding = died([settled, other])

    # Which of them did it nobody knows: the one that is left runs alone.
    assert (tags(finding.over), tags(finding.suspects), finding.charged) == ([1], [2], [])
    assert died([settled]) == Finding(over=[settled], crashed=True)


def test_a_process_that_had_not_begun_died_of_nobody_at_first() -> None:
    (lone,) = flights(1)

    for times in (1, 2, 3):
        assert died([], [lone]) == Finding(again=[lone])
        assert lone.aboard == times

    finding = died([], [lone])
    assert [flight.tag for flight, _ in finding.charged] == [1]
    assert finding.crashed
    failure = finding.charged[0][1].failure
    assert failure is not None
    assert failure.message == "the process that was given the message, and had not begun with it, was killed"


def test_what_was_acknowledged_is_given_to_no_more_than_so_many_processes() -> None:
    one, other = flights(2, settled=[1])
    for _ in range(5):
        assert died([], [one, other]).over == []

    finding = died([], [one, other])

    assert (tags(finding.over), tags(finding.again)) == ([1], [2])


def late_and_told(all_: list[Flight]) -> Finding:
    """Two of three have been told, and did not heed it."""
    return died(all_, late={1, 2})


def late_and_told_beside_others(all_: list[Flight]) -> Finding:
    """One has been told, another one could not be."""
    return died(all_, late={1}, held_up={2})


def late_and_nobody_told(all_: list[Flight]) -> Finding:
    """Nobody could be told: somebody held up the others."""
    return died(all_, held_up={2})


@pytest.mark.parametrize(
    ("end", "charged", "held_up"),
    [
        (late_and_told, [1, 2], []),
        (late_and_told_beside_others, [1], [2, 3]),
        (late_and_nobody_told, [], [1, 2, 3]),
    ],
)
def test_who_was_killed_for_a_time_limit(
    end: Callable[[list[Flight]], Finding], charged: list[int], held_up: list[int]
) -> None:
    """It is a timeout of those who knew, and no crash of anybody."""
    all_ = flights(3)

    finding = end(all_)

    assert [flight.tag for flight, _ in finding.charged] == charged
    assert all(outcome.failure is not None for _, outcome in finding.charged)
    assert {outcome.failure.kind for _, outcome in finding.charged if outcome.failure} <= {errors.TIMEOUT}
    assert [(outcome.attempts, outcome.crashes) for _, outcome in finding.charged] == [(1, 0)] * len(charged)
    assert tags(finding.held_up) == held_up
    assert tags(finding.again) == [tag for tag in (1, 2, 3) if tag not in charged]
    assert not finding.crashed
    assert finding.suspects == []


def test_who_is_killed_alone_for_what_nobody_could_be_told_of_is_charged_for_both_times() -> None:
    all_ = flights(2)
    late_and_nobody_told(all_)

    ((flight, outcome),) = died([all_[1]], held_up={2}).charged

    assert (flight.tag, outcome.attempts, outcome.crashes) == (2, 2, 0)


def test_what_a_killed_process_had_not_begun_with_was_not_near_a_death() -> None:
    running, behind = flights(2)
    died([running], [behind], late={1})
    assert behind.aboard == 0
