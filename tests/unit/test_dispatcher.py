"""Who runs where, and in whose company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

from kq.backend import Delivery
from kq.executor import Job
from kq.router import Consumer
from kq.worker.dispatcher import Dispatcher
from kq.worker.flight import Flight
from kq.worker.pool import Event, Place
from kq.worker.round_robin import RoundRobin


class Places:
    """A pool that only notes what it was given."""

    def __init__(self, count: int, window: int = 4) -> None:
        self.places = [Place(number, window, ready=True) for number in range(1, count + 1)]
        self.lock = Lock()
        self.needs_watching = False
        self.is_stuck = False

    def start(self) -> None: ...
    def wake(self) -> None: ...
    def recall(self) -> None: ...
    def resume(self) -> None: ...
    def give_back(self) -> None: ...
    def replace(self) -> None: ...
    def dump(self, name_of: Callable[[int], str]) -> None: ...

    def submit(self, place: Place, jobs: Sequence[Job]) -> None:
        place.tags.update(job.tag for job in jobs)

    def poll(self, timeout: float) -> list[Event]:
        return []

    def close(self, patience: float) -> list[Event]:
        return []

    @property
    def running(self) -> list[set[int]]:
        """What each place runs."""
        return [place.tags for place in self.places]


class Hands:
    """Holds deliveries, and answers when it is told to."""

    def __init__(self) -> None:
        self.held: dict[int, Flight] = {}
        self.released: list[int] = []
        self.asked: list[Callable[[], None]] = []

    @property
    def in_hand(self) -> int:
        return len(self.held)

    def release(self, flight: Flight) -> None:
        self.released.append(flight.tag)
        del self.held[flight.tag]

    def drop(self, flight: Flight) -> None:
        del self.held[flight.tag]

    def when_settled(self, queue: str, call: Callable[[], None]) -> None:
        self.asked.append(call)


class Desk:
    """A dispatcher and what belongs to it."""

    def __init__(self, places: int = 2, concurrency: int | None = None) -> None:
        self.pool = Places(places)
        self.hands = Hands()
        consumer = Consumer("handle", "app:q", lambda payload: payload, concurrency=concurrency)
        turns = {"app:q": RoundRobin([consumer])}
        self.dispatcher = Dispatcher(self.pool, turns, self.hands, isolate_from=10)

    def put(self, tag: int, *, crashes: int = 0, deliveries: int = 0, settled: bool = False) -> Flight:
        """Have a delivery wait."""
        flight = Flight(tag, Delivery("app:q", f"m{tag}", b"", 0, crashes, deliveries, None), settled=settled)
        self.hands.held[tag] = flight
        self.dispatcher.put(flight, front=False)
        return flight

    def end(self, flight: Flight) -> None:
        """Have a run end."""
        for place in self.pool.places:
            place.tags.discard(flight.tag)
        self.dispatcher.ended(flight)
        self.hands.held.pop(flight.tag, None)


def test_the_emptiest_place_first() -> None:
    """Deliveries are spread evenly, as far as places have room."""
    desk = Desk()
    for tag in range(1, 12):
        desk.put(tag)

    desk.dispatcher.dispatch()

    assert [len(running) for running in desk.pool.running] == [4, 4]


def test_what_would_run_last_is_taken_back_first() -> None:
    """In order; but not what was acknowledged beforehand, which runs here or never."""
    desk = Desk(places=1)
    flights = [desk.put(tag, settled=tag == 10) for tag in range(1, 11)]
    desk.dispatcher.dispatch()

    taken = desk.dispatcher.take_last(3)

    assert taken == flights[6:9]
    assert desk.dispatcher.take_last(100) == flights[4:6]
    for flight in flights[:4]:
        desk.end(flight)
    desk.dispatcher.dispatch()
    assert desk.pool.running == [{10}]


def test_what_may_kill_its_process_runs_alone_in_it() -> None:
    """A message that has crashed waits for an empty place, and nothing joins it there."""
    desk = Desk()
    busy = [desk.put(tag) for tag in (1, 2)]
    desk.dispatcher.dispatch()
    suspect = desk.put(3, crashes=1)
    desk.dispatcher.dispatch()
    assert all(3 not in running for running in desk.pool.running)

    desk.end(busy[0])
    desk.put(4)
    desk.dispatcher.dispatch()
    assert {3} in desk.pool.running

    desk.put(5)
    desk.dispatcher.dispatch()
    assert {3} in desk.pool.running
    desk.end(suspect)
    desk.put(6)
    desk.dispatcher.dispatch()
    assert desk.hands.in_hand == 4


def test_every_empty_place_takes_one_that_is_alone() -> None:
    """Several that must be alone run at the same time, one in each place."""
    desk = Desk(places=3)
    for tag in (1, 2, 3):
        desk.put(tag, crashes=1)

    desk.dispatcher.dispatch()

    assert sorted(map(sorted, desk.pool.running)) == [[1], [2], [3]]


def test_a_place_that_is_gone_is_not_waited_for() -> None:
    """Where the place that was kept free dies, another one is found."""
    desk = Desk()
    first = desk.put(1, crashes=1)
    second = desk.put(2, crashes=1)
    desk.put(3, crashes=1)
    desk.dispatcher.dispatch()
    desk.end(first)
    desk.end(second)
    desk.pool.places.pop()

    desk.dispatcher.dispatch()

    assert desk.pool.running == [{3}]


def test_nobody_waits_for_a_consumer_at_its_cap() -> None:
    """One that must be alone and whose consumer runs as many as it may keeps no place free."""
    desk = Desk(places=1, concurrency=1)
    running = desk.put(1)
    desk.dispatcher.dispatch()
    desk.put(2, crashes=1)
    desk.dispatcher.dispatch()
    assert desk.pool.running == [{1}]

    desk.end(running)
    desk.dispatcher.dispatch()
    assert desk.pool.running == [{2}]


def test_what_many_workers_did_not_survive_runs_with_nothing_else_in_hand() -> None:
    """The rest is given back, what runs is finished, and the broker knows it, before such a message starts."""
    desk = Desk()
    running = desk.put(1)
    desk.dispatcher.dispatch()
    desk.put(2, deliveries=10)
    desk.put(3)
    desk.put(4, deliveries=12)
    desk.dispatcher.dispatch()

    assert sorted(desk.hands.released) == [3, 4]
    assert desk.dispatcher.isolating
    assert not any(2 in places for places in desk.pool.running)
    desk.end(running)
    desk.dispatcher.dispatch()
    assert not any(2 in places for places in desk.pool.running)
    (answer,) = desk.hands.asked
    answer()
    desk.dispatcher.dispatch()
    assert any(2 in places for places in desk.pool.running)


def test_an_answer_that_is_too_old_does_not_count() -> None:
    """What arrives after the question is given back, and the question is asked anew."""
    desk = Desk()
    desk.put(1, deliveries=10)
    desk.dispatcher.dispatch()
    (answer,) = desk.hands.asked
    desk.put(2)
    answer()
    desk.dispatcher.dispatch()
    assert desk.hands.released == [2]
    assert not any(desk.pool.running)

    desk.hands.asked[-1]()
    desk.dispatcher.dispatch()
    assert any(1 in places for places in desk.pool.running)


def test_an_answer_for_one_that_was_lost_does_not_count_for_the_next() -> None:
    """In between there was no isolation, and what ran then may not be settled yet."""
    desk = Desk(places=1)
    desk.pool.places[0].ready = False
    first = desk.put(1, deliveries=10)
    desk.dispatcher.dispatch()
    (answer,) = desk.hands.asked
    answer()
    first.delivery.lost = True
    desk.dispatcher.drop_lost()

    desk.pool.places[0].ready = True
    desk.put(2, deliveries=10)
    desk.dispatcher.dispatch()
    assert not any(desk.pool.running)

    desk.hands.asked[-1]()
    desk.dispatcher.dispatch()
    assert desk.pool.running == [{2}]


def test_what_was_acknowledged_beforehand_is_not_given_back() -> None:
    """It runs here or never, so it runs before the one that must be isolated."""
    desk = Desk()
    desk.put(1, settled=True)
    desk.put(2, deliveries=10)

    desk.dispatcher.dispatch()

    assert desk.hands.released == []
    assert any(1 in places for places in desk.pool.running)


def test_what_was_lost_while_it_waited_is_dropped() -> None:
    """It runs elsewhere."""
    desk = Desk()
    kept, lost = desk.put(1), desk.put(2)
    lost.delivery.lost = True

    desk.dispatcher.drop_lost()
    desk.dispatcher.dispatch()

    assert list(desk.hands.held) == [kept.tag]
    assert any(1 in places for places in desk.pool.running)


def test_a_place_that_ran_one_alone_is_free_for_isolation() -> None:
    """Also for what was acknowledged beforehand, which has to be done with first."""
    desk = Desk(places=1)
    alone = desk.put(1, deliveries=2)
    desk.dispatcher.dispatch()
    paid = desk.put(2, settled=True)
    isolated = desk.put(3, deliveries=10)
    desk.dispatcher.dispatch()
    assert desk.pool.running == [{1}]

    desk.end(alone)
    desk.dispatcher.dispatch()
    assert desk.pool.running == [{2}]
    desk.end(paid)
    desk.dispatcher.dispatch()
    for answer in desk.hands.asked:
        answer()
    desk.dispatcher.dispatch()
    assert desk.pool.running == [{isolated.tag}]


def test_who_is_alone_takes_no_company_nor_does_what_waits_for_it() -> None:
    """Nothing is to be fetched for the room beside it: others could run that."""
    desk = Desk(places=1)
    (place,) = desk.pool.places
    running = desk.put(1)
    desk.dispatcher.dispatch()
    assert desk.dispatcher.takes_company(place)
    alone = desk.put(2, crashes=1)
    desk.dispatcher.dispatch()
    assert not desk.dispatcher.takes_company(place)
    desk.end(running)
    desk.dispatcher.dispatch()
    assert place.tags == {2}
    assert not desk.dispatcher.takes_company(place)
    desk.end(alone)
    desk.dispatcher.dispatch()
    assert desk.dispatcher.takes_company(place)
