"""A selection of the catalogue, each scenario once and brief; ``scripts/chaos`` plays all of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests import broker as brokers
from tests.chaos.catalogue import SCENARIOS
from tests.chaos.ground import Ground
from tests.chaos.stage import SIZES

#: The programs that start a broker of our own.
_PROGRAMS = {"redis": "redis-server", "rabbitmq": "rabbitmq-server"}
#: Whatever a machine's mood, these chances are always the same.
_SEED = 20_261_125

_PLAYS = [(scenario.name, kind) for scenario in SCENARIOS.values() for kind in scenario.quick]


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """Brokers of our own, kept for all scenarios of this process."""
    with Ground() as made:
        yield made


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("name", "kind"), _PLAYS, ids=[f"{name}-{kind}" for name, kind in _PLAYS])
def test_scenario(ground: Ground, name: str, kind: str) -> None:
    """Under this fault nothing is lost, and the rest of what the scenario promises holds."""
    program = _PROGRAMS.get(kind)
    if program is not None and shutil.which(program) is None:
        text = f"no {program} here to start"
        if kind in brokers.REQUIRED:
            pytest.fail(f"{text}, and {kind} is required")
        pytest.skip(f"{text}: NOT TESTED on {kind}")

    result = ground.play(SCENARIOS[name], kind, _SEED, SIZES["brief"])

    assert result.passed, "\n".join(result.failures) + f"\nlogs: {result.logs}"
