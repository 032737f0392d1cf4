"""Several consumers of one queue, in real processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Shop, wait_for


@pytest.fixture
def competing(shop: Shop) -> Shop:
    """A shop whose app also has consumers that compete."""
    shutil.copy(Path(__file__).with_name("competing.py"), shop.folder / "competing.py")
    shop.broker.used += [shop.queue + "-shared", shop.queue + "-timed"]
    return shop


def most_at_once(history: list[dict[str, Any]], name: str) -> int:
    """Return how many runs of a consumer there were at once."""
    moments = sorted((line["at"], line["event"]) for line in history if line["event"].startswith(name))
    running = most = 0
    for _, event in moments:
        running += 1 if event.endswith("started") else -1
        most = max(most, running)
    return most


def test_consumers_of_a_queue_share_its_messages(competing: Shop) -> None:
    """Two consumers of one queue both get work, each message runs once, and each one's cap holds."""
    shop, queue = competing, competing.queue + "-shared"
    shop.app.publish_many(queue, [{"n": n, "do": "sleep", "seconds": 0.2} for n in range(24)])
    shop.worker("-p", "2", "-c", "8", "-Q", queue, app="competing:app")

    wait_for(lambda: len(shop.history("narrow done")) + len(shop.history("wide done")) == 24, "all of them")

    history = shop.history()
    assert sorted(line["n"] for line in history if line["event"].endswith("started")) == list(range(24))
    assert most_at_once(history, "narrow") == 1
    assert most_at_once(history, "wide") in (2, 3)
    assert f"{queue}  ->  narrow  (at most 1 at once)" in shop.log()
    assert f"{queue}  ->  wide  (at most 3 at once)" in shop.log()


@pytest.mark.parametrize("do", ["sleep", "hold"])
def test_a_time_limit_is_that_of_the_consumer(competing: Shop, do: str) -> None:
    """The limit of one consumer ends its own run, also by killing its process, and not that of the other."""
    shop, queue = competing, competing.queue + "-timed"
    shop.app.publish_many(queue, [{"n": n, "do": do, "seconds": 4} for n in range(2)])
    shop.worker("-p", "2", "-c", "1", "-Q", queue, app="competing:app")

    (letter,) = wait_for(lambda: shop.app.dead(queue).list(), "the dead letter")
    (done,) = shop.until("long done")

    assert (letter.reason, letter.error_kind, letter.attempts) == ("max_attempts", "TIMEOUT", 1)
    assert "handler short ran past its timeout of 0.3 s" in letter.error_message
    assert [line["n"] for line in shop.history("short started")] == [letter.payload["n"]]
    assert done["n"] != letter.payload["n"]
    assert len(shop.history("long started")) == 1
