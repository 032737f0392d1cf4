from __future__ import annotations

from collections import Counter

import pytest

from kq.backend import Delivery
from kq.backends.rabbitmq_arrivals import Arrivals


def arrivals(*queues: str) -> Arrivals:
    """Arrivals of these queues, one after the other, with tags from 1 on."""
    made = Arrivals(dict.fromkeys(queues))
    for tag, queue in enumerate(queues, 1):
        made.add(tag, Delivery(queue, f"{queue}{tag}", b"", 0, 0, 0, tag))
    return made


def ids(taken: list[Delivery]) -> list[str]:
    return [delivery.id for delivery in taken]


def tags(taken: list[Delivery]) -> list[int]:
    return [delivery.receipt for delivery in taken]


def test_few_are_handed_over_in_turn() -> None:
    """One queue's single message does not wait for another one's many, and who was not served comes first then."""
    waiting = arrivals("a", "a", "a", "a", "b", "c")
    assert ids(waiting.take(2, {})) == ["a1", "b5"]
    assert ids(waiting.take(2, {})) == ["c6", "a2"]
    assert ids(waiting.take(9, {})) == ["a3", "a4"]
    assert (ids(waiting.take(9, {})), len(waiting)) == ([], 0)


def test_many_are_handed_over_as_they_came() -> None:
    """Whatever their queues are, so that the broker finds what is acknowledged at the front."""
    waiting = arrivals(*"abcd" * 100)
    assert tags(waiting.take(150, {})) == list(range(1, 151))
    assert len(waiting) == 250


@pytest.mark.parametrize("times", [3, 200], ids=["few", "many"])
def test_no_more_than_credit_and_caps(times: int) -> None:
    """Of a queue with a limit come no more than that, of one without room nothing, and of the others what is left."""
    waiting = arrivals(*"abc" * times)
    for credit, caps in ((3, {"a": 1}), (4, {"a": 0}), (2, {"a": 0, "b": 0}), (0, {}), (600, {"b": 2, "c": 1})):
        before = {queue: waiting.count(queue) for queue in "abc"}
        ready = waiting.ready(credit, caps)
        taken = waiting.take(credit, caps)
        counts = Counter(delivery.queue for delivery in taken)
        assert len(taken) == ready == min(credit, sum(min(before[q], caps.get(q, credit)) for q in "abc"))
        assert all(counts[queue] <= most for queue, most in caps.items())
        assert all(waiting.count(queue) == before[queue] - counts[queue] for queue in "abc")
    left = sorted(delivery.receipt for delivery in waiting)
    assert sorted(tags(waiting.take(999, {}))) == left


def test_of_a_queue_always_the_oldest_comes_first() -> None:
    """Also where few follow on many."""
    waiting = arrivals(*"aab" * 200)
    taken: list[Delivery] = []
    while len(waiting):
        taken += waiting.take(7, {"a": 3})
    of_a = [delivery.receipt for delivery in taken if delivery.queue == "a"]
    of_b = [delivery.receipt for delivery in taken if delivery.queue == "b"]
    assert (of_a, of_b) == (sorted(of_a), sorted(of_b))
    assert (len(of_a), len(of_b)) == (400, 200)


def test_some_are_removed() -> None:
    waiting = arrivals("a", "b", "a", "b")
    assert ids(waiting.remove(lambda delivery: delivery.receipt in (2, 3))) == ["a3", "b2"]
    assert (len(waiting), waiting.count("a"), waiting.count("b")) == (2, 1, 1)
    waiting.clear()
    assert (len(waiting), list(waiting)) == (0, [])
