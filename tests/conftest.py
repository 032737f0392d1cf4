"""What all tests share: brokers, apps, and an environment without our variables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kq
from kq.security import set_strict
from tests import broker as brokers
from tests.broker import Broker


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the caller's KQ_ variables out of the tests."""
    for name in list(os.environ):
        if name.startswith("KQ_") and not name.startswith("KQ_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _lax_process() -> Iterator[None]:
    """Let no strict app make the tests after its own strict."""
    yield
    set_strict(False)


@pytest.fixture(params=brokers.ALL)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """Every broker in turn."""
    found = brokers.find(request.param, tmp_path)
    yield found
    found.forget()


@pytest.fixture(params=brokers.SHARED)
def shared_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """Every broker that several processes can share, in turn."""
    found = brokers.find(request.param, tmp_path)
    yield found
    found.forget()


@pytest.fixture
def queue_id(broker: Broker) -> str:
    """The id of a queue that nobody else uses."""
    return broker.queue_id()


@pytest.fixture
def make_app(broker: Broker) -> Iterator[Callable[..., kq.App]]:
    """Makes apps on the broker, and closes them."""
    apps: list[kq.App] = []

    def make(**settings: Any) -> kq.App:
        app = kq.App("test", broker=broker.url, **settings)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


@pytest.fixture
def app(make_app: Callable[..., kq.App]) -> kq.App:
    """An app on the broker."""
    return make_app()
