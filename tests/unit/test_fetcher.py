from __future__ import annotations

from collections.abc import Mapping
from threading import Event
from typing import Any
from uuid import uuid4

import pytest

import kq
from kq.backend import Delivery, Settlement
from kq.config import Settings
from kq.driver import Driver
from kq.fetcher import Fetcher
from kq.outcome import DONE
from kq.queue_spec import default_spec
from kq.scheme import open_backend


def test_what_is_settled_while_more_is_fetched_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A settlement that comes between two looks of the fetcher's is carried out at once, not at the next renewal."""
    url = f"memory://{uuid4().hex}"
    app = kq.App("fetcher", broker=url)
    app.publish("app:a", 1)
    backend = open_backend(Settings(broker=url), "test")
    feed = backend.feed([default_spec("app:a")], 10)
    monkeypatch.setattr(backend, "feed", lambda queues, prefetch: feed)
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
    fetcher.start()
    try:
        assert settled.wait(20)
    finally:
        fetcher.stop(10)
        backend.close()
    assert app.info("app:a").message_count == 0
