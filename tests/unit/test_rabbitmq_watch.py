"""When a subscription is looked after, and when it counts as dead."""

from __future__ import annotations

from kq.backends.rabbitmq_watch import Watch


def room(queue: str) -> bool:
    """There is always room."""
    return True


def test_a_quiet_queue_is_looked_into() -> None:
    """One of which nothing has come between two turns is looked into; the first turn only counts."""
    watch = Watch(["a"], 0.0)

    assert watch.due(room, 1.0) is None
    assert watch.due(room, 2.0) is None
    assert watch.due(room, 4.0) == "a"


def test_a_busy_queue_is_left_alone() -> None:
    """One of which something has come needs no look."""
    watch = Watch(["a"], 0.0)
    watch.due(room, 2.0)
    watch.arrived("a")

    assert watch.due(room, 4.0) is None


def test_without_room_nothing_is_expected() -> None:
    """A queue whose window is full sends nothing, and is not looked into."""
    watch = Watch(["a"], 0.0)
    watch.due(room, 2.0)

    assert watch.due(lambda queue: False, 4.0) is None


def test_many_queues_take_turns_and_cost_no_more() -> None:
    """However many there are, there is at most one look a second."""
    watch = Watch([f"q{n}" for n in range(100)], 0.0)

    looks = [queue for tenth in range(4000) if (queue := watch.due(room, tenth / 10)) is not None]

    assert len(looks) <= 400
    assert len(set(looks)) == 100


def test_messages_that_wait_and_do_not_come_are_the_end() -> None:
    """A queue that sends nothing within a second although messages wait is told of, once."""
    watch = Watch(["a"], 0.0)
    watch.waits("a", 10.0)

    assert watch.dead(room, 10.5) is None
    assert watch.dead(room, 11.0) == "a"
    assert watch.dead(room, 12.0) is None


def test_a_message_that_comes_ends_the_doubt() -> None:
    """What waited was only on its way."""
    watch = Watch(["a"], 0.0)
    watch.waits("a", 10.0)
    watch.arrived("a")

    assert watch.dead(room, 20.0) is None


def test_new_subscriptions_end_the_doubt() -> None:
    """A link that was opened anew is trusted again."""
    watch = Watch(["a"], 0.0)
    watch.waits("a", 10.0)
    watch.forget()

    assert watch.dead(room, 20.0) is None
