"""Looking after dead letters: some of many, several of one id, and those that a stranger has put there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from kq.backend import Settlement
from kq.backends.redis_key import prefix
from kq.backends.store import Entry
from kq.backends.stored import StoredBackend
from kq.config import Settings
from kq.envelope import clean, pack
from kq.outcome import DONE, Outcome
from kq.scheme import open_backend
from tests.conformance.conftest import ON_REDIS, ON_SQLITE, ON_STORES, Bench


def bury(bench: Bench, *ids: str, times: int = 1) -> None:
    """Have messages of these ids die, one life after another, each leaving a letter behind."""
    for _ in range(times):
        bench.publish(*[bench.message(id, headers={"note": id}) for id in ids])
        feed = bench.feed()
        found = bench.take(feed, len(ids))
        dead = [Settlement(delivery, Outcome("dead", 0.0, 1, 0, "not_retryable")) for delivery in found]
        assert feed.settle(dead) == ([], [])
        feed.close()


def letters(bench: Bench) -> list[str]:
    """Return the ids of all letters, in their order."""
    return [letter.id for letter in bench.backend.browse(bench.dead, 1000, 0)]


def store_of(bench: Bench) -> Any:
    """Return what holds the messages of a bench."""
    assert isinstance(bench.backend, StoredBackend)
    return bench.backend._store()


def test_letters_of_one_id_are_one_to_whoever_names_it(bench: Bench) -> None:
    """A message that was published and died several times is found, and dropped, by the one id that it has."""
    bury(bench, "a", "b", times=3)
    assert sorted(letters(bench)) == ["a"] * 3 + ["b"] * 3

    found = bench.backend.find(bench.dead, "a")
    assert found is not None
    assert (found.id, found.headers["note"]) == ("a", "a")
    assert bench.backend.remove(bench.dead, ["a", "none", "a"]) == 3

    assert letters(bench) == ["b"] * 3
    assert bench.backend.find(bench.dead, "a") is None
    assert bench.backend.remove(bench.dead, ["a"]) == 0


def test_some_of_many_are_sent_back(bench: Bench) -> None:
    """Those that are named, wherever they stand; what is named in vain is passed over."""
    ids = [f"m{n:02}" for n in range(60)]
    bury(bench, *ids)

    assert bench.backend.replay(bench.dead, ["m59", "none", "m00", "m31"], bench.queue, clean) == 3

    assert letters(bench) == [id for id in ids if id not in ("m00", "m31", "m59")]
    back = bench.take(bench.feed(), 3)
    assert sorted(delivery.id for delivery in back) == ["m00", "m31", "m59"]


def test_a_letter_is_found_again_after_the_first_of_its_id_has_gone(bench: Bench) -> None:
    """It is kept under another id then, and is still the one that is asked for."""
    bury(bench, "a", times=2)
    assert bench.backend.replay(bench.dead, ["a"], bench.queue, clean) >= 1
    bench.backend.purge(bench.queue)
    bury(bench, "b")

    found = bench.backend.find(bench.dead, "a")
    if not bench.broker.stores:
        # RabbitMQ has no ids of its own: both went back.
        assert found is None
        return
    assert found is not None
    assert found.id == "a"
    assert bench.backend.replay(bench.dead, ["a"], bench.queue, clean) == 1
    assert letters(bench) == ["b"]


@ON_STORES
def test_a_stranger_s_letter_is_found_by_the_id_in_it(bench: Bench) -> None:
    """Whatever it is stored under: that is not what anybody reads."""
    letter = bench.message("inside").envelope
    store_of(bench).put(bench.dead.id, [Entry("outside", pack(letter), 4)], None)

    found = bench.backend.find(bench.dead, "inside")
    assert found is not None
    assert found.id == "inside"
    assert bench.backend.find(bench.dead, "outside") is None
    assert bench.backend.remove(bench.dead, ["outside"]) == 0
    assert bench.backend.replay(bench.dead, ["inside"], bench.queue, clean) == 1
    assert letters(bench) == []

    store_of(bench).put(bench.dead.id, [Entry("elsewhere", pack(letter), 4), Entry("kept", b"\x92\xa1x\x01", 4)], None)
    assert bench.backend.remove(bench.dead, ["inside", "x"]) == 1
    found = bench.backend.find(bench.dead, "kept")
    assert found is not None
    assert (found.id, letters(bench)) == ("kept", ["kept"])


@ON_REDIS
def test_bytes_that_a_stranger_pushed_are_dropped_by_what_they_are(bench: Bench) -> None:
    """There is nothing else to call them by."""
    bury(bench, "a")
    with redis.Redis.from_url(bench.broker.url) as client:
        client.rpush(prefix(bench.dead.id) + "r:4", "hello")

    assert letters(bench) == ["a", "hello"]
    assert bench.backend.remove(bench.dead, ["hello"]) == 1
    assert letters(bench) == ["a"]


@ON_STORES
def test_all_that_are_asked_for_are_read(make_bench: Callable[..., Bench]) -> None:
    """Also where they are so large that no single call returns them all."""
    bench = make_bench(lease=30.0)
    bodies = b'"' + b"x" * 2**20 + b'"'
    bench.publish(*[bench.message(f"m{n:02}", queue=bench.dead, body=bodies) for n in range(20)])

    # What is in memory takes no more of it for being looked at.
    assert bench.broker.name == "memory" or len(store_of(bench).browse(bench.dead.id, 100, 0)) < 20
    assert letters(bench) == [f"m{n:02}" for n in range(20)]
    assert [letter.id for letter in bench.backend.browse(bench.dead, 3, 16)] == ["m16", "m17", "m18"]
    assert bench.backend.browse(bench.dead, 3, 20) == []


@ON_STORES
def test_those_that_are_named_are_read_a_few_at_a_time(make_bench: Callable[..., Bench]) -> None:
    """All of them, however large they are together."""
    bench = make_bench(lease=30.0)
    ids = [f"m{n:02}" for n in range(20)]
    body = b'"' + b"x" * 2**20 + b'"'
    bench.publish(*[bench.message(id, queue=bench.dead, body=body) for id in ids])

    assert [key for key, _ in store_of(bench).look(bench.dead.id, [*ids, "none"])] == ids
    assert bench.backend.replay(bench.dead, ids, bench.queue, clean) == 20


@ON_SQLITE
def test_a_purge_of_many_lets_others_in(make_bench: Callable[..., Bench]) -> None:
    """It drops what waits when it begins, and neither what comes meanwhile nor what somebody holds."""
    bench = make_bench(lease=60.0)
    store = store_of(bench)
    feed = bench.feed()
    bench.publish(bench.message("held"))
    (held,) = bench.take(feed, 1)
    raw = pack(bench.message().envelope)
    for lot in range(3):
        store.put(bench.queue.id, [Entry(f"{lot}-{n}", raw, 4) for n in range(4000)], None)
    others: list[list[Any]] = []
    bystander = open_backend(Settings(broker=bench.broker.url), "bystander")
    own = store._transaction

    @contextmanager
    def transaction() -> Iterator[Any]:
        with own() as db:
            yield db
        # Somebody else's turn; and what it brings stands at the end, where nothing is left before it.
        others.append(bystander.publish([bench.message(f"new-{len(others)}")], 10.0))

    store._transaction = transaction
    try:
        assert bench.backend.purge(bench.queue) == 12_000
    finally:
        del store._transaction
        bystander.close()

    assert len(others) == 5
    assert others == [[None]] * 5
    assert [letter.id for letter in bench.backend.browse(bench.queue, 10, 0)] == [f"new-{n}" for n in range(5)]
    feed.renew()
    assert not held.lost
    assert feed.settle([Settlement(held, DONE)]) == ([], [])


@ON_STORES
@pytest.mark.parametrize("offset", range(6))
def test_what_waits_for_later_comes_after_what_waits_now(bench: Bench, offset: int) -> None:
    """By priority first, then in its order; what is delayed behind all else."""
    bench.publish(
        bench.message("later", queue=bench.dead, delay=60.0),
        bench.message("plain", queue=bench.dead),
        bench.message("soon", queue=bench.dead, delay=30.0, priority=9),
        bench.message("first", queue=bench.dead, priority=9),
    )

    order = ["first", "plain", "soon", "later"]
    if bench.broker.name == "memory":
        order[2:] = ["later", "soon"]
    assert [letter.id for letter in bench.backend.browse(bench.dead, 2, offset)] == order[offset : offset + 2]
