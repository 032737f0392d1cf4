"""When a worker gives back what others could run."""

from __future__ import annotations

from kq.worker.hoard import HOARDS_AFTER, Hoard


def test_what_is_wanted_is_no_hoard() -> None:
    """Nor is a little more, as windows change."""
    hoard = Hoard()
    for now in (0.0, 10.0, 20.0):
        assert hoard.surplus(16, 16, 1, now) == (0, False)
        assert hoard.surplus(32, 16, 1, now) == (0, False)
    assert not hoard.is_watched


def test_too_much_for_a_moment_is_no_hoard() -> None:
    """Windows that were wide an instant ago empty by themselves, if handlers are fast."""
    hoard = Hoard()
    assert hoard.surplus(1000, 16, 1, 0.0) == (0, False)
    assert hoard.is_watched
    assert hoard.surplus(900, 16, 1, 0.9 * HOARDS_AFTER) == (0, False)
    assert hoard.surplus(20, 16, 1, HOARDS_AFTER) == (0, False)
    assert not hoard.is_watched
    assert hoard.surplus(1000, 16, 1, 2.0 * HOARDS_AFTER) == (0, False)


def test_too_much_for_long_goes_back_down_to_what_is_wanted() -> None:
    """All of it, also what comes back from children later, when it is less than twice as much."""
    hoard = Hoard()
    hoard.surplus(1000, 16, 1, 0.0)
    assert hoard.surplus(990, 16, 1, HOARDS_AFTER) == (974, True)
    assert hoard.surplus(20, 16, 1, HOARDS_AFTER + 0.1) == (4, False)
    assert hoard.surplus(16, 16, 1, HOARDS_AFTER + 0.2) == (0, False)
    assert hoard.surplus(20, 16, 1, HOARDS_AFTER + 0.3) == (0, False)


def test_what_another_broker_may_bring_does_not_go_back() -> None:
    """Or it would come again at once, for ever: each broker has its part, whatever the others have brought."""
    hoard = Hoard()
    for now in (0.0, 10.0):
        assert hoard.surplus(8, 1, 4, now) == (0, False)
    hoard.surplus(1000, 16, 2, 20.0)
    assert hoard.surplus(1000, 16, 2, 20.0 + HOARDS_AFTER) == (976, True)
    assert hoard.surplus(24, 16, 2, 20.1 + HOARDS_AFTER) == (0, False)


def test_what_cannot_be_given_back_is_not_asked_for_all_the_time() -> None:
    """After as long again it is looked at as if it were new."""
    hoard = Hoard()
    hoard.surplus(100, 16, 1, 0.0)
    assert hoard.surplus(100, 16, 1, HOARDS_AFTER) == (84, True)
    assert hoard.surplus(100, 16, 1, 1.5 * HOARDS_AFTER) == (84, False)
    assert hoard.surplus(100, 16, 1, 2.0 * HOARDS_AFTER) == (0, False)
    assert hoard.surplus(100, 16, 1, 3.0 * HOARDS_AFTER) == (84, True)
