from __future__ import annotations

from collections.abc import Mapping
from math import inf

from kq.backends.rabbitmq_window import NARROW_AFTER, WIDEN_EVERY, Demand, Narrow, Widen, Windows


def decide(
    windows: Windows,
    has: Mapping[str, int],
    demands: Mapping[str, tuple[int, int]],
    now: float = 100.0,
    *,
    is_enough: bool = False,
) -> Widen | Narrow | None:
    """What is decided where each demand is (wanted, here)."""
    return windows.decide(
        has, {queue: Demand(*demand) for queue, demand in demands.items()}, is_enough=is_enough, now=now
    )


def test_a_single_queue_gets_what_is_wanted() -> None:
    """Rounded up by an eighth at most, and no more than the widest."""
    assert decide(Windows(2000), {"a": 0}, {"a": (16, 0)}) == Widen({"a": 16})
    assert decide(Windows(2000), {"a": 0}, {"a": (17, 0)}) == Widen({"a": 18})
    assert decide(Windows(2000), {"a": 0}, {"a": (100, 0)}) == Widen({"a": 104})
    assert decide(Windows(2000), {"a": 16}, {"a": (1500, 16)}) == Widen({"a": 1536})


def test_many_queues_share() -> None:
    """Sixteen handlers do not have sixteen messages of each of a hundred queues wait for them."""
    names = [f"q{n}" for n in range(100)]
    none = dict.fromkeys(names, 0)
    slow = decide(Windows(2000), none, dict.fromkeys(names, (16, 0)))
    fast = decide(Windows(2000), none, dict.fromkeys(names, (2000, 0)))
    assert slow == Widen(dict.fromkeys(names, 1))
    assert fast == Widen(dict.fromkeys(names, 80))
    four = "abcd"
    assert decide(Windows(2000), dict.fromkeys(four, 0), dict.fromkeys(four, (16, 0))) == Widen(dict.fromkeys(four, 16))


def test_a_queue_that_alone_has_messages_gets_everything() -> None:
    """Step by step, until it has brought what is wanted or its window is as wide as that."""
    windows = Windows(2000)
    has = dict.fromkeys([f"q{n}" for n in range(100)], 1)
    empty = dict.fromkeys(list(has)[1:], (64, 0))
    steps = []
    while (change := decide(windows, has, {"q0": (64, has["q0"]), **empty})) is not None:
        assert isinstance(change, Widen)
        assert set(change.windows) == {"q0"}
        has.update(change.windows)
        steps.append(has["q0"])
    assert steps == [4, 16, 64]


def test_a_change_ends_the_wait_for_one() -> None:
    """Whoever waits for the moment in which a window may be widened would wait for one that is over."""
    windows = Windows(2000)
    windows.changed(100.0)
    assert decide(windows, {"a": 16}, {"a": (100, 16)}, 100.0) is None
    assert windows.widen_at == 100.0 + WIDEN_EVERY
    windows.changed(100.01)
    windows.hurry()
    assert windows.widen_at == inf


def test_what_is_not_filled_is_wide_enough() -> None:
    """All that there was has come."""
    assert decide(Windows(2000), {"a": 16}, {"a": (100, 7)}) is None
    assert decide(Windows(2000), {"a": 16}, {"a": (100, 8)}) == Widen({"a": 104})


def test_nothing_is_widened_where_enough_has_come() -> None:
    """But subscribed to is a queue all the same: it may have what should not wait for the others."""
    has = {"a": 4, "b": 0}
    assert decide(Windows(2000), has, {"a": (8, 4), "b": (4, 0)}, is_enough=True) == Widen({"b": 4})
    assert decide(Windows(2000), has, {"a": (8, 4), "b": (0, 0)}, is_enough=True) is None


def test_changes_do_not_follow_on_each_other_at_once() -> None:
    """But when the time has come, nothing else need happen first."""
    windows = Windows(2000)
    windows.changed(100.0)
    assert decide(windows, {"a": 8}, {"a": (16, 8)}, 100.01) is None
    assert windows.widen_at == 100.0 + WIDEN_EVERY
    assert decide(windows, {"a": 8}, {"a": (16, 8)}, windows.widen_at) == Widen({"a": 16})
    assert windows.widen_at == inf
    windows.changed(100.0)
    windows.hurry()
    assert decide(windows, {"a": 8}, {"a": (16, 8)}, 100.01) == Widen({"a": 16})


def test_a_window_is_narrowed_when_it_has_been_too_wide_for_long() -> None:
    windows = Windows(2000)
    has = {"a": 512, "b": 64}
    assert decide(windows, has, {"a": (32, 30), "b": (32, 3)}, 100.0) is None
    assert decide(windows, has, {"a": (32, 30), "b": (32, 3)}, 99.9 + NARROW_AFTER) is None
    assert decide(windows, has, {"a": (32, 30), "b": (32, 3)}, 100.0 + NARROW_AFTER) == Narrow({"a": 32})
    # Counted anew: the next one has to be too wide for as long.
    assert decide(windows, has, {"a": (32, 30), "b": (32, 3)}, 100.1 + NARROW_AFTER) is None


def test_a_window_that_was_needed_meanwhile_is_not_narrowed() -> None:
    windows = Windows(2000)
    assert decide(windows, {"a": 512}, {"a": (32, 30)}, 100.0) is None
    assert decide(windows, {"a": 512}, {"a": (500, 300)}, 103.0) is None
    assert decide(windows, {"a": 512}, {"a": (32, 30)}, 100.0 + NARROW_AFTER) is None
    assert decide(windows, {"a": 512}, {"a": (32, 30)}, 100.0 + 2 * NARROW_AFTER) == Narrow({"a": 32})


def test_a_full_window_keeps_none_wide_that_is_too_wide() -> None:
    """What is handed over is enough: so another queue's messages are not hoarded because this one has many."""
    windows = Windows(2000)
    has = {"a": 2000, "b": 16}
    for now in (100.0, 100.0 + NARROW_AFTER):
        change = decide(windows, has, {"a": (32, 2000), "b": (32, 16)}, now, is_enough=True)
    assert change == Narrow({"a": 32})


def test_a_queue_of_which_nothing_is_wanted_ends_its_subscription() -> None:
    """After the same time: it may be wanted again at any moment."""
    windows = Windows(2000)
    assert decide(windows, {"a": 4}, {"a": (0, 0)}, 100.0) is None
    assert decide(windows, {"a": 4}, {"a": (0, 0)}, 100.0 + NARROW_AFTER) == Narrow({"a": 0})
    assert decide(windows, {"a": 0}, {"a": (0, 0)}, 200.0) is None
