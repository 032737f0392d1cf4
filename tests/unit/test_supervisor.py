from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from threading import Event, Semaphore
from uuid import uuid4

import pytest

import kq
from kq import errors
from kq.backend import Delivery, QueueSpec
from kq.driver import Driver
from kq.executor import Job
from kq.fetcher import Fetcher
from kq.intake import Intake
from kq.outcome import DONE, Death, Outcome
from kq.router import Consumer
from kq.worker.pool import Died, Finished, Place, Returned
from kq.worker.pool import Event as PoolEvent
from kq.worker.supervisor import Supervisor
from tests.unit.test_dispatcher import Places

QUEUE = QueueSpec("app:q", dead_letter="app:q.dead")


class Watched(Places):
    """A pool that counts how often it was woken, and that can break."""

    def __init__(self, count: int = 2, window: int = 4) -> None:
        super().__init__(count, window)
        self.woken = 0
        self.broken = False
        self.events: list[PoolEvent] = []

    def poll(self, timeout: float) -> list[PoolEvent]:
        events, self.events = self.events, []
        return events

    def wake(self) -> None:
        self.woken += 1

    def submit(self, place: Place, jobs: Sequence[Job]) -> None:
        if self.broken:
            raise RuntimeError("broken")
        super().submit(place, jobs)


def arrange(concurrency: int | None = None) -> tuple[Supervisor, Watched]:
    """A supervisor that has nothing to do."""
    pool = Watched()
    consumer = Consumer("app:q", "handle", lambda payload: payload, concurrency=concurrency)
    supervisor = Supervisor(
        pool, consumers={"app:q": (consumer,)}, specs={"app:q": QUEUE}, max_deliveries=20, max_body=100, prefetch=100
    )
    supervisor.attach(Intake({}))
    return supervisor, pool


def deliveries(count: int, lost: int = 0) -> list[Delivery]:
    return [Delivery("app:q", f"m{n}", b"x", 0, 0, lost, None) for n in range(count)]


def test_a_few_deliveries_are_handed_out_at_once() -> None:
    """In the thread that brings them, without waking another one."""
    supervisor, pool = arrange()
    supervisor.arrived(deliveries(3))
    assert sum(map(len, pool.running)) == 3
    assert pool.woken == 0


def test_many_are_left_to_the_worker() -> None:
    """Their fetcher goes on fetching."""
    supervisor, pool = arrange()
    supervisor.arrived(deliveries(100))
    assert not any(pool.running)
    assert pool.woken == 1


def test_a_worker_that_is_busy_is_not_waited_for() -> None:
    """Its own thread sees what has arrived."""
    supervisor, pool = arrange()
    with pool.lock:
        supervisor.arrived(deliveries(1))
    assert not any(pool.running)
    assert pool.woken == 1


def test_the_worker_hears_of_what_it_must_watch_over() -> None:
    """Of time limits, and of a message that nothing else may be in hand with."""
    supervisor, pool = arrange()
    pool.needs_watching = True
    supervisor.arrived(deliveries(1))
    assert pool.woken == 1
    supervisor, pool = arrange()
    supervisor.arrived(deliveries(1, lost=15))
    assert pool.woken == 1


def test_the_worker_hears_of_what_waits_for_its_own_consumer() -> None:
    """There is room for others then, which it asks for."""
    supervisor, pool = arrange(concurrency=2)
    supervisor.arrived(deliveries(2))
    assert pool.woken == 0
    supervisor.arrived(deliveries(1))
    assert pool.woken == 1


def test_what_goes_wrong_in_a_fetchers_thread_ends_the_worker() -> None:
    """As it would in its own."""
    supervisor, pool = arrange()
    pool.broken = True
    supervisor.arrived(deliveries(1))
    assert pool.woken == 1
    with pytest.raises(RuntimeError, match="broken"):
        supervisor.turn(0.0)


@contextmanager
def at_work(pool: Watched, count: int, max_deliveries: int = 20) -> Iterator[tuple[kq.App, Supervisor, Fetcher]]:
    """A supervisor with so many deliveries that have arrived from a broker, all that there are."""
    url = f"memory://{uuid4().hex}"
    arrived = Semaphore(0)
    with kq.App("supervisor", broker=url) as app:
        consumer = Consumer(name="handle", queue="app:q", handler=lambda payload: payload, timeout=1.0)
        supervisor = Supervisor(
            pool,
            consumers={"app:q": (consumer,)},
            specs={"app:q": QUEUE},
            max_deliveries=max_deliveries,
            max_body=2**20,
            prefetch=100,
        )

        def arrive(deliveries: list[Delivery]) -> None:
            supervisor.arrived(deliveries)
            arrived.release(len(deliveries))

        fetcher = Fetcher(
            app.registry.backend(), [QUEUE], driver=Driver(url), prefetch=100, lease=600, on_deliveries=arrive
        )
        supervisor.attach(Intake({"app:q": fetcher}))
        app.publish_many("app:q", list(range(1, count + 1)))
        fetcher.hold(count)
        fetcher.start()
        for _ in range(count):
            assert arrived.acquire(timeout=20)
        supervisor.turn(0.0)
        yield app, supervisor, fetcher


def died(
    place: Place, *, running: Sequence[int] = (), queued: Sequence[int] = (), late: Sequence[int] = (),
    held_up: Sequence[int] = (),
) -> Died:  # fmt: skip
    """The death of a place's process."""
    return Died(
        place, Death(exit_signal=9), "was killed", list(running), list(queued), frozenset(late), frozenset(held_up)
    )


def settled(fetcher: Fetcher) -> None:
    """Wait until the broker knows of all that is settled."""
    known = Event()
    fetcher.when_settled(known.set)
    assert known.wait(20)


@pytest.mark.parametrize(
    ("running", "late", "held_up", "charged", "alone"),
    [
        # One of three has held up the others.
        ((0, 1, 2), (), (0, 1), (), (0, 1, 2)),
        # Who did not heed its limit has, whoever else was there.
        ((0, 1, 2), (0,), (), (0,), ()),
        ((0, 1, 2), (0,), (1,), (0,), (1, 2)),
        # Nobody else can have done it.
        ((0,), (), (0,), (0,), ()),
        # Whoever was late has ended in the last moment.
        ((1,), (), (0,), (), ()),
    ],
)
def test_who_is_charged_for_a_time_limit(
    running: Sequence[int], late: Sequence[int], held_up: Sequence[int], charged: Sequence[int], alone: Sequence[int]
) -> None:
    """Those that were told; and of those that could not be told who is killed again, alone, for both times."""
    pool = Watched(1, window=3)
    with at_work(pool, 3) as (_, supervisor, fetcher):
        (place,) = pool.places
        tags = sorted(place.tags)
        flights = [supervisor._flights[tag] for tag in tags]
        notes: list[tuple[int, Outcome]] = []
        supervisor._note = lambda flight, outcome: notes.append((tags.index(flight.tag), outcome))  # type: ignore[method-assign]

        def die(running: Sequence[int], late: Sequence[int], held_up: Sequence[int]) -> None:
            tagged = [[tags[n] for n in which] for which in (running, late, held_up)]
            queued = [tag for tag in place.tags if tag not in tagged[0]]
            pool.events = [died(place, running=tagged[0], queued=queued, late=tagged[1], held_up=tagged[2])]
            place.tags.clear()
            supervisor.turn(0.0)

        die(running, late, held_up)
        assert [(n, outcome.attempts, outcome.failure.kind) for n, outcome in notes if outcome.failure] == [
            (n, 1, errors.TIMEOUT) for n in charged
        ]
        assert [n for n, flight in enumerate(flights) if flight.alone] == list(alone)
        assert not any(flight.aboard for flight in flights)
        if len(alone) == 3:
            notes.clear()
            (guilty,) = place.tags
            n = tags.index(guilty)
            die((n,), (), (n,))
            assert [(n, outcome.attempts) for n, outcome in notes] == [(n, 2)]
        assert fetcher.stop(20)


@pytest.mark.parametrize("is_late", [False, True])
def test_without_children_only_suspects_are_kept(is_late: bool) -> None:
    """Others may have places for the rest; but whoever gave a suspect back would never know who was guilty."""
    pool = Watched(1, window=2)
    with at_work(pool, 3) as (app, supervisor, fetcher):
        (place,) = pool.places
        assert len(place.tags) == 2
        pool.events = [died(place, running=list(place.tags), held_up=list(place.tags) if is_late else ())]
        place.ready, pool.is_stuck = False, True
        supervisor.turn(0.0)
        settled(fetcher)
        info = app.info("app:q")
        assert fetcher.stop(20)
    assert (info.in_flight, info.ready) == (2, 1)


def test_without_children_what_was_there_whenever_one_died_is_kept() -> None:
    """Likewise, where no handler had begun: what is counted of it would be lost."""
    pool = Watched(1, window=2)
    with at_work(pool, 1) as (app, supervisor, fetcher):
        (place,) = pool.places
        (culprit,) = place.tags
        for is_last in (False, False, True):
            pool.events = [died(place, queued=[culprit])]
            place.ready, pool.is_stuck = not is_last, is_last
            place.tags.clear()
            supervisor.turn(0.0)
        settled(fetcher)
        assert (supervisor.in_hand, app.info("app:q").in_flight) == (1, 1)
        assert fetcher.stop(20)


@pytest.mark.parametrize("by", ["nothing", "time", "reload"])
def test_what_ended_while_it_was_lost_is_done_with_when_it_comes_back(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for other code, or so much later that it is another life of it: then it runs."""
    pool = Watched(1, window=2)
    with at_work(pool, 1) as (_, supervisor, fetcher):
        (place,) = pool.places
        (tag,) = place.tags
        delivery = supervisor._flights[tag].delivery
        again = copy(delivery)
        delivery.lost = True
        pool.events = [Finished(place, [(tag, DONE)])]
        place.tags.clear()
        supervisor.turn(0.0)
        assert supervisor.in_hand == 0
        if by == "reload":
            supervisor.forget_ends()
        elif by == "time":
            monkeypatch.setattr("kq.worker.adrift._BACK_WITHIN", -1.0)
        supervisor.arrived([again])
        supervisor.turn(0.0)
        assert bool(place.tags) == (by != "nothing")
        assert fetcher.stop(20)


def test_what_kills_whoever_receives_it_is_found() -> None:
    """A message may take its process with it before a handler starts: then nothing runs, or only others do."""
    pool = Watched(1, window=3)
    with at_work(pool, 3) as (app, supervisor, fetcher):
        (place,) = pool.places
        culprit, *others = sorted(place.tags)
        for _ in range(3):
            # Those that run are done with each time, and nobody else is blamed.
            pool.events = [died(place, queued=[culprit])]
            place.tags.clear()
            supervisor.turn(0.0)
            assert culprit in place.tags
        assert supervisor.tally.crashes == 0
        pool.events = [died(place, queued=[culprit])]
        place.tags.clear()
        supervisor.turn(0.0)
        assert supervisor.tally.crashes == 1
        assert supervisor.tally.retried == 1
        assert supervisor.in_hand == len(others)
        fetcher.hold(0)
        settled(fetcher)
        assert app.info("app:q").in_flight == 2
        assert fetcher.stop(20)


def test_whoever_waited_behind_the_guilty_is_not_charged_for_it(caplog: pytest.LogCaptureFixture) -> None:
    """Having been given to processes that others have ended, a message runs alone, and has its own crashes."""
    pool = Watched(1, window=5)
    with at_work(pool, 5) as (_, supervisor, fetcher):
        (place,) = pool.places
        for _ in range(3):
            first, *others = sorted(place.tags)
            pool.events = [died(place, running=[first], queued=others)]
            place.tags.clear()
            supervisor.turn(0.0)
        assert supervisor.tally.retried == 3
        (innocent,) = place.tags
        pool.events = [died(place, running=[innocent])]
        place.tags.clear()
        supervisor.turn(0.0)
        assert fetcher.stop(20)
    retries = [vars(record)["attempts"] for record in caplog.records if vars(record).get("action") == "retry"]
    assert retries == [1, 1, 1, 1]


def test_what_was_acknowledged_and_kills_whoever_receives_it_is_given_up() -> None:
    """Nothing can be charged to it, and it would go on for ever."""
    pool = Watched(1)
    with at_work(pool, 1) as (_, supervisor, fetcher):
        (place,) = pool.places
        (tag,) = place.tags
        supervisor._flights[tag].settled = True
        for _ in range(6):
            assert place.tags == {tag}
            pool.events = [died(place, queued=[tag])]
            place.tags.clear()
            supervisor.turn(0.0)
        assert not place.tags
        assert supervisor.in_hand == 0
        assert fetcher.stop(20)


def test_what_is_far_too_large_is_given_to_nobody() -> None:
    """A process might not live to refuse it."""
    pool = Watched(1)
    with at_work(pool, 1) as (_, supervisor, fetcher):
        large = Delivery("app:q", "large", bytes(2**21 + 1), 0, 0, 0, None)
        supervisor.arrived([large])
        supervisor.turn(0.0)
        assert supervisor.tally.reasons == {"undecodable": 1}
        assert supervisor.in_hand == 1
        assert fetcher.stop(20)


def test_who_is_cut_off_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """At the end of its time, where nobody is charged; those that had been settled are not to run again."""
    pool = Watched(1)
    with at_work(pool, 2) as (_, supervisor, fetcher):
        (place,) = pool.places
        first, second = sorted(place.tags)
        supervisor.take_last([Finished(place, [(second, DONE)], early=True), died(place, running=[first, second])])
        assert fetcher.stop(20)
    (record,) = [record for record in caplog.records if getattr(record, "action", "") == "cut_off"]
    assert record.getMessage().startswith("cut off at the end: 1; ")


def test_what_waits_for_handlers_that_have_become_slow_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a place has that has not started, a second later; what runs stays."""
    now = 1000.0
    monkeypatch.setattr("kq.worker.supervisor.monotonic", lambda: now)
    pool = Watched(1, window=50)
    recalls: list[None] = []
    monkeypatch.setattr(pool, "give_back", lambda: recalls.append(None))
    with at_work(pool, 50) as (app, supervisor, fetcher):
        (place,) = pool.places
        assert len(place.tags) == 50

        place.window = 2
        supervisor.turn(0.0)
        assert not recalls
        now += 1.0
        supervisor.turn(0.0)
        assert len(recalls) == 1
        waiting = sorted(place.tags)[2:]
        place.tags.difference_update(waiting)
        pool.events = [Returned(place, waiting)]
        supervisor.turn(0.0)
        assert supervisor.in_hand == len(place.tags) == 2
        fetcher.hold(0)
        settled(fetcher)
        info = app.info("app:q")
        assert fetcher.stop(20)
    assert (info.in_flight, info.ready) == (2, 48)


@pytest.mark.parametrize(("max_deliveries", "expected"), [(3, 0), (4, 1)])
def test_what_may_be_lost_but_few_times_does_not_go_back(
    monkeypatch: pytest.MonkeyPatch, max_deliveries: int, expected: int
) -> None:
    """RabbitMQ counts it as lost once at the next worker, which would run it with nothing else, or not at all."""
    now = 1000.0
    monkeypatch.setattr("kq.worker.supervisor.monotonic", lambda: now)
    pool = Watched(1, window=50)
    recalls: list[None] = []
    monkeypatch.setattr(pool, "give_back", lambda: recalls.append(None))
    with at_work(pool, 50, max_deliveries) as (_, supervisor, fetcher):
        pool.places[0].window = 2
        for _ in range(3):
            supervisor.turn(0.0)
            now += 0.6
        assert fetcher.stop(20)
    assert len(recalls) == expected
