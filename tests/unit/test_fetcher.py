from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from queue import Queue
from threading import Event
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest

import kq
from kq import errors
from kq.backend import Backend, Delivery, Feed, Settlement, Settling
from kq.config import Settings
from kq.driver import Driver
from kq.fetcher import Fetcher
from kq.intake import Intake
from kq.outcome import DONE
from kq.queue_spec import default_spec
from kq.scheme import open_backend


def one_message(monkeypatch: pytest.MonkeyPatch) -> tuple[str, kq.App, Backend, Feed]:
    """Return a broker's URL, an app that has published a message to ``app:a`` there, a backend, and its only feed."""
    url = f"memory://{uuid4().hex}"
    app = kq.App("fetcher", broker=url)
    app.publish("app:a", 1)
    backend = open_backend(Settings(broker=url), "test")
    feed = backend.feed([default_spec("app:a")], 10)
    monkeypatch.setattr(backend, "feed", lambda queues, prefetch: feed)
    return url, app, backend, feed


@contextmanager
def running(fetcher: Fetcher, backend: Backend) -> Iterator[None]:
    """Run a fetcher, and close what it fetches from after it has ended."""
    fetcher.start()
    try:
        yield
    finally:
        fetcher.stop(10)
        backend.close()


def test_after_an_outage_leases_are_renewed_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """What became due while the broker was away is not put off: the leases may be about to end."""
    url, _, backend, feed = one_message(monkeypatch)
    arrived, back = Event(), Event()
    calls: list[str] = []
    back_at = inf

    def passing(name: str) -> Callable[..., Any]:
        call = getattr(feed, name)

        def asked(*arguments: Any) -> Any:
            nonlocal back_at
            if arrived.is_set():
                # Away for as long as it takes two renewals to become due, from the first call on.
                back_at = min(back_at, monotonic() + 2.5 * lease / 3)
                if monotonic() < back_at:
                    raise errors.Internal("away", details={"reason": "unavailable"})
                calls.append(name)
                back.set()
            return call(*arguments)

        return asked

    for name in ("renew", "fetch"):
        monkeypatch.setattr(feed, name, passing(name))
    lease = 1.5
    fetcher = Fetcher(
        backend, [default_spec("app:a")], driver=Driver(url, reconnect_initial=0.01, reconnect_max=0.3), prefetch=10,
        lease=lease, on_deliveries=lambda deliveries: arrived.set(),
    )  # fmt: skip
    fetcher.hold(5)
    with running(fetcher, backend):
        assert arrived.wait(20)
        assert back.wait(20)
    assert calls[0] == "renew"


@pytest.mark.parametrize(
    "error",
    [errors.Internal("away", details={"reason": "unavailable"}), errors.PermissionDenied("no"), RuntimeError("broken")],
)
def test_who_has_nothing_to_settle_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whatever the broker answers: another one's message may wait for that, to run alone."""
    url, _, backend, feed = one_message(monkeypatch)
    settled = Event()

    def refuse(credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        raise error

    monkeypatch.setattr(feed, "fetch", refuse)
    fetcher = Fetcher(
        backend, [default_spec("app:a")], driver=Driver(url, reconnect_initial=0.01), prefetch=10, lease=600,
        on_deliveries=lambda deliveries: None,
    )  # fmt: skip
    fetcher.hold(0)
    fetcher.when_settled(settled.set)
    with running(fetcher, backend):
        assert settled.wait(20)


def test_a_blocked_broker_is_asked_again_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has not taken yet it may have on its way, and gives to others as well where nobody waits for it."""
    url, app, backend, feed = one_message(monkeypatch)
    arrived: Queue[Delivery] = Queue()
    tries = []
    settle = feed.settle

    def block(settlements: Any) -> Any:
        tries.append(len(settlements))
        if len(tries) < 4:
            blocked = errors.Internal("it takes nothing now", details={"reason": "blocked"})
            return Settling([], [(settlement, blocked) for settlement in settlements])
        return settle(settlements)

    monkeypatch.setattr(feed, "settle", block)
    fetcher = Fetcher(
        backend, [default_spec("app:a")], driver=Driver(url), prefetch=10, lease=600,
        on_deliveries=lambda deliveries: arrived.put(deliveries[0]),
    )  # fmt: skip
    with running(fetcher, backend):
        delivery = arrived.get(timeout=20)
        fetcher.settle([Settlement(delivery, DONE)])
        assert fetcher.stop(20.0)
        assert tries == [1] * 4
        assert app.info("app:a").message_count == 0


def test_two_brokers_are_asked_with_different_patience() -> None:
    """The one that has the message's queue is waited for, whatever happens; any other one as long as it answers."""
    backend = open_backend(Settings(broker=f"memory://{uuid4().hex}"), "test")
    asked: dict[str, bool] = {}

    class Asked(Fetcher):
        def when_settled(self, call: Callable[[], None], *, patient: bool = True) -> None:
            asked[self._queues[0].id] = patient
            call()

    fetchers = {
        queue: Asked(
            backend, [default_spec(queue)], driver=Driver("memory://"), prefetch=1, lease=600,
            on_deliveries=lambda deliveries: None,
        )
        for queue in ("app:a", "app:b")
    }  # fmt: skip
    settled = Event()
    Intake(fetchers).when_settled("app:b", settled.set)
    assert settled.is_set()
    assert asked == {"app:a": False, "app:b": True}
    backend.close()


@pytest.mark.parametrize("patient", [True, False])
def test_only_its_own_broker_is_waited_for(monkeypatch: pytest.MonkeyPatch, patient: bool) -> None:
    """A message of another broker's need not wait until this one, which is away, takes what is settled."""
    url, _, backend, feed = one_message(monkeypatch)
    arrived: Queue[Delivery] = Queue()
    settled, back = Event(), Event()
    tries: Queue[None] = Queue()
    settle = feed.settle

    def refuse(settlements: Any) -> Any:
        tries.put(None)
        if not back.is_set():
            raise errors.Internal("away", details={"reason": "unavailable"})
        return settle(settlements)

    monkeypatch.setattr(feed, "settle", refuse)
    fetcher = Fetcher(
        backend, [default_spec("app:a")], driver=Driver(url, reconnect_initial=0.01, reconnect_max=0.01), prefetch=10,
        lease=600, on_deliveries=lambda deliveries: arrived.put(deliveries[0]),
    )  # fmt: skip
    with running(fetcher, backend):
        delivery = arrived.get(timeout=20)
        fetcher.hold(0)
        fetcher.settle([Settlement(delivery, DONE)])
        fetcher.when_settled(settled.set, patient=patient)
        for _ in range(5):
            tries.get(timeout=20)
        if patient:
            assert not settled.is_set()
            back.set()
        assert settled.wait(20)
        back.set()


def test_what_is_settled_while_more_is_fetched_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A settlement that comes between two looks of the fetcher's is carried out at once, not at the next renewal."""
    url, app, backend, feed = one_message(monkeypatch)
    arrived: list[Delivery] = []
    settled = Event()
    fetch, settle = feed.fetch, feed.settle

    def fetch_late(credit: int, caps: Mapping[str, int]) -> list[Delivery]:
        if arrived:
            fetcher.settle([Settlement(arrived.pop(), DONE)])
            fetcher.finished("app:a")
        return fetch(credit, caps)

    def settle_and_say(settlements: Any) -> Any:
        try:
            return settle(settlements)
        finally:
            settled.set()

    monkeypatch.setattr(feed, "fetch", fetch_late)
    monkeypatch.setattr(feed, "settle", settle_and_say)
    fetcher = Fetcher(
        backend, [default_spec("app:a")], driver=Driver(url), prefetch=10, lease=600, on_deliveries=arrived.extend
    )
    fetcher.hold(5)
    with running(fetcher, backend):
        assert settled.wait(20)
    assert app.info("app:a").message_count == 0


def test_what_is_done_when_it_ends_is_settled_once_the_broker_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what has been handled would run again because its worker was stopped during a short outage."""
    url, app, backend, feed = one_message(monkeypatch)
    arrived = Queue[Delivery]()
    asked = 0
    settle = feed.settle

    def settle_when_back(settlements: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked <= 3:
            raise errors.Internal("away", details={"reason": "unavailable"})
        return settle(settlements)

    monkeypatch.setattr(feed, "settle", settle_when_back)
    fetcher = Fetcher(
        backend, [default_spec("app:a")], driver=Driver(url, reconnect_initial=30.0), prefetch=10, lease=600,
        on_deliveries=lambda deliveries: arrived.put(deliveries[0]),
    )  # fmt: skip
    fetcher.hold(5)
    fetcher.start()
    fetcher.settle([Settlement(arrived.get(timeout=20), DONE)])
    fetcher.finished("app:a")
    try:
        assert fetcher.stop(20)
    finally:
        backend.close()
    assert asked == 4
    assert app.info("app:a").message_count == 0
