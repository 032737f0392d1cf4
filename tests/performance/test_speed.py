"""Guards against a loss of speed that nobody meant: kq beside a bare client's loop, in the same moments.

The figures of ``scripts/bench`` are several times as high as what is asked for here: a busy machine fails nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bare import DRAINS
from benchmarks.contender import BARE, CONTENDERS
from benchmarks.measure import Bench
from benchmarks.publish import Order
from tests import broker as brokers

MESSAGES = 5_000
SINGLES = 500
WARM = 10
#: Each may have a bad moment.
TRIES = 3

#: What of the bare client's rate kq must reach at least: one at a time, in bulk, and draining.
LEAST = {
    "redis": {"publish": 0.25, "bulk": 0.1, "drain": 0.03},
    "rabbitmq": {"publish": 0.25, "bulk": 0.2, "drain": 0.15},
    "sqlite": {"publish": 0.2, "bulk": 0.1, "drain": 0.05},
}


def published(bench: Bench) -> dict[str, float]:
    """Return the rates at which somebody publishes."""
    return {
        "publish": bench.publish(Order(SINGLES, warm=WARM)),
        "bulk": bench.publish(Order(MESSAGES, "many", warm=WARM)),
    }


def rates(broker: str, url: str) -> dict[str, float]:
    """Return kq's rates as parts of the bare client's."""
    with Bench(BARE, url) as bench:
        bare = {**published(bench), "drain": DRAINS[broker](url, MESSAGES, Order.pad)}
    with Bench(CONTENDERS[broker][0], url) as bench:
        ours = {**published(bench), "drain": bench.drain(SINGLES + MESSAGES + 2 * WARM)["drain"]}
    return {name: ours[name] / bare[name] for name in ours}


@pytest.mark.parametrize("name", LEAST)
def test_kq_is_not_slower_than_it_was(name: str, tmp_path: Path) -> None:
    """In the best of a few tries each rate is well above a part of the bare client's."""
    url = brokers.find(name, tmp_path).url
    best = dict.fromkeys(LEAST[name], 0.0)
    for _ in range(TRIES):
        for what, rate in rates(name, url).items():
            best[what] = max(best[what], rate)
        if all(best[what] >= least for what, least in LEAST[name].items()):
            return
    raise AssertionError(f"expected at least {LEAST[name]} of the bare client's rate, got {best}")
