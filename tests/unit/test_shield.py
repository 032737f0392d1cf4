from __future__ import annotations

import pytest

from kq.shield import HandlerTimeout, Shield


def test_what_was_due_is_raised_where_the_outermost_ends() -> None:
    """A time limit that falls into kq's own work strikes right after it, and only once."""
    shield = Shield()
    reached = []

    def work() -> None:
        with shield:
            with shield:
                shield.is_due = True
            reached.append("after the inner one")

    with pytest.raises(HandlerTimeout):
        work()
    assert reached == ["after the inner one"]
    with shield:
        pass
    assert (shield.depth, shield.is_due) == (0, False)


def test_without_a_limit_nothing_is_raised() -> None:
    """Errors pass as they are."""
    shield = Shield()
    with pytest.raises(KeyError), shield:
        raise KeyError
    assert shield.depth == 0
