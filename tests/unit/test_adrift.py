"""Runs whose messages were lost."""

from __future__ import annotations

import pytest

from kq.backend import Delivery
from kq.outcome import DONE
from kq.worker import adrift
from kq.worker.adrift import Adrift
from kq.worker.flight import Flight


def delivery(id: str = "a", raw: bytes = b"1", attempts: int = 0, crashes: int = 0) -> Delivery:
    """One as it arrives."""
    return Delivery("app:q", id, raw, attempts, crashes, 0, None)


def lost(made: Delivery) -> Flight:
    """One that runs, and is not ours any more."""
    made.lost = True
    return Flight(1, made)


OTHERS = [delivery("b"), delivery(raw=b"2"), delivery(attempts=1), delivery(crashes=1)]


def test_what_comes_back_as_it_was_belongs_to_its_run() -> None:
    runs = Adrift()
    flight = lost(delivery())
    runs.lose([flight, Flight(2, delivery("c"))])
    assert runs
    assert [runs.find(one) for one in [*OTHERS, delivery("c")]] == [None] * 5

    assert runs.find(delivery()) is flight
    # It is adrift no more.
    assert runs.find(delivery()) is None
    assert not runs


def test_a_run_that_is_over_or_settled_takes_nothing() -> None:
    runs = Adrift()
    flight = lost(delivery())
    runs.lose([flight])
    flight.settled = True
    assert runs.find(delivery()) is None
    runs.forget(flight)
    assert not runs


def test_how_a_run_ended_is_known_once_for_what_comes_back_as_it_was() -> None:
    runs = Adrift()
    for other in OTHERS:
        runs.remember_end(delivery(), DONE)
        assert runs.end_of(other) is None
        runs.forget_ends()
    runs.remember_end(delivery(), DONE)
    assert runs.end_of(delivery()) is DONE
    assert runs.end_of(delivery()) is None


def test_ends_are_forgotten_in_time_and_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Adrift()
    monkeypatch.setattr(adrift, "_ENDS", 2)
    for id in "abc":
        runs.remember_end(delivery(id), DONE)
    assert [runs.end_of(delivery(id)) for id in "ab"] == [None, DONE]
    monkeypatch.setattr(adrift, "_BACK_WITHIN", -1.0)
    assert runs.end_of(delivery("c")) is None
