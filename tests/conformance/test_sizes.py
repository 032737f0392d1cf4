from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import kq
from tests.broker import Broker

MakeApp = Callable[..., kq.App]


def test_large_and_small_messages_mix(make_app: MakeApp, broker: Broker, queue_id: str) -> None:
    """Every body arrives as it was, whatever the sizes of those before it; what strangers put there as well."""
    app = make_app()
    seen: Counter[tuple[int, int]] = Counter()

    @app.consumer(queue_id)
    def handle(payload: dict[str, str]) -> None:
        seen[int(payload["n"]), len(payload["text"])] += 1

    sizes = [10, 20_000, 10, 300_000, 5_000, 0, 1_500] * 6
    published = Counter((n, size) for n, size in enumerate(sizes))
    # Large ones first, so that those that follow come to a worker that expects large ones.
    for n, size in sorted(enumerate(sizes), key=lambda pair: -pair[1]):
        app.publish(queue_id, {"n": str(n), "text": "x" * size})
        if n % 14 == 0:
            broker.put_raw(queue_id, b"not ours %d" % n)
    assert app.drain() == len(sizes) + 3
    assert seen == published
    assert {letter.reason for letter in app.dead(queue_id).list()} == {"undecodable"}


def test_what_has_expired_is_not_run_among_large_ones(make_app: MakeApp, queue_id: str) -> None:
    """Marks of a message do not depend on how its body is fetched."""
    app = make_app()
    seen = []
    app.consumer(queue_id)(lambda payload: seen.append(payload[0]))
    for n in range(6):
        app.publish(queue_id, [n, "x" * 50_000], expires=0.001 if n % 2 else None)
    app.drain()
    assert sorted(seen) == [0, 2, 4]
    assert app.info(queue_id).dead == 3
