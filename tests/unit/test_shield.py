from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from kq.shield import HandlerTimeout, Shield, carry, deferring, shielded, strike


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


def test_where_nothing_may_be_raised_it_strikes_after_that() -> None:
    """Where somebody asks for it, or at the end of the next work that may raise it; without a shield nothing does."""
    with deferring(), shielded():
        strike()
    shield = Shield()

    def work() -> list[str]:
        carry(shield)
        reached = []
        with deferring():
            with shielded():
                shield.is_due = True
            reached.append("in the middle")
        reached.append("behind it")
        try:
            strike()
        except HandlerTimeout:
            reached.append("struck")
        # Once only.
        strike()
        return reached

    with ThreadPoolExecutor(1) as threads:
        reached = threads.submit(work).result(30)
    assert reached == ["in the middle", "behind it", "struck"]
    assert (shield.depth, shield.is_due) == (0, False)
