"""The checker itself: it must find what is lost, and nothing else."""

from __future__ import annotations

import pytest

from tests.chaos.ledger import Ledger


def test_all_is_well() -> None:
    """What was published, confirmed and done once is nothing to report."""
    ledger = Ledger.of(attempted="abc", acked="abc", started="abc", done="ab", dead="c")

    assert ledger.lost | ledger.unexpected | ledger.both | ledger.recovered == frozenset()
    assert (ledger.duplicated, ledger.imbalance) == (0, 0)


def test_lost_and_never_stored() -> None:
    """A confirmed message without an end is lost; one that nobody even started was confirmed falsely."""
    ledger = Ledger.of(attempted="abcd", acked="abcd", started="abc", done="a")

    assert ledger.lost == {"b", "c", "d"}
    assert ledger.false_confirmations == {"d"}
    assert ledger.imbalance == 3


def test_what_waits_is_not_lost_but_balances() -> None:
    """A message that the broker still holds has no end yet, and the accounts balance."""
    ledger = Ledger.of(attempted="ab", acked="ab", started="a", done="a", waiting=1)

    assert ledger.imbalance == 0


def test_duplicates_are_counted_by_their_ends() -> None:
    """Each end beyond a message's first counts; starts without an end do not."""
    ledger = Ledger.of(attempted="ab", acked="ab", started="aaabb", done="aaab")

    assert ledger.duplicated == 2


def test_recovered_and_unexpected() -> None:
    """What came out unconfirmed was attempted; what nobody attempted is unexpected."""
    ledger = Ledger.of(attempted="ab", acked="a", started="abx", done="abx")

    assert ledger.recovered == {"b", "x"}
    assert ledger.unexpected == {"x"}


@pytest.mark.parametrize(("waiting", "imbalance"), [(0, 0), (1, -1)])
def test_the_broker_holds_too_much(waiting: int, imbalance: int) -> None:
    """A message that is done and still there breaks the law of conservation."""
    assert Ledger.of(attempted="a", acked="a", started="a", done="a", waiting=waiting).imbalance == imbalance


def test_done_and_dead() -> None:
    """A message has one end."""
    assert Ledger.of(attempted="a", acked="a", started="a", done="a", dead="a").both == {"a"}
