"""How many messages one call moves."""

from __future__ import annotations

from kq.backends.store import Entry, Move, in_lots


def moves(*sizes: int) -> list[Move]:
    """Moves of messages of so many bytes."""
    return [Move(f"{n}", 1, Entry(f"{n}", b"x" * size, 4)) for n, size in enumerate(sizes)]


def test_small_ones_are_counted() -> None:
    """Sixty-four go into one lot, all of them and in their order into some."""
    few = moves(*[1] * 150)
    assert [len(lot) for lot in in_lots(few)] == [64, 64, 22]
    assert [move for lot in in_lots(few) for move in lot] == few


def test_large_ones_are_weighed() -> None:
    """A lot has 4 MiB at most, but for a single message that is larger."""
    mib = 2**20
    assert [len(lot) for lot in in_lots(moves(3 * mib, mib, 1, 5 * mib, 2 * mib, 2 * mib, 1))] == [2, 1, 1, 2, 1]


def test_nothing_is_no_lot() -> None:
    """Where there is nothing to move nobody is asked."""
    assert list(in_lots([])) == []
