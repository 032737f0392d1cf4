"""What a scenario is, and what becomes of one run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.chaos.stage import Stage

SHARED: Final = ("sqlite", "redis", "rabbitmq")
SERVERS: Final = ("redis", "rabbitmq")


@dataclass(frozen=True)
class Scenario:
    """A fault, and what is promised under it.

    Attributes:
        name: By which people ask for it.
        family: What kind of fault it is.
        promise: What must hold; the first line of its docstring.
        play: What happens.
        on: The brokers on which it can happen.
        quick: Those on which the quick selection plays it.
        site: By broker, what the broker is started with.
        wired: Whether a proxy stands between workers and broker.
        long: Whether it takes minutes: played only when asked for.
    """

    name: str
    family: str
    promise: str
    play: Callable[[Stage], None]
    on: tuple[str, ...] = SHARED
    quick: tuple[str, ...] = ()
    site: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wired: bool = False
    long: bool = False

    def arguments(self, kind: str) -> tuple[str, ...]:
        """Return what a broker of a kind is started with."""
        return self.site.get(kind, ())


def scenario(family: str, **values: Any) -> Callable[[Callable[[Stage], None]], Scenario]:
    """Make a scenario of a function: its name is the scenario's, its docstring the promise."""

    def make(play: Callable[[Stage], None]) -> Scenario:
        assert play.__doc__ is not None
        name = play.__name__.replace("_", "-")
        return Scenario(name, family, play.__doc__.strip().partition("\n")[0], play, **values)

    return make


@dataclass
class Result:
    """One run of a scenario.

    Attributes:
        scenario: Its name.
        kind: The broker.
        seed: What its chances came from.
        seconds: How long it took.
        failures: Which promises were broken; empty if it passed.
        figures: What was counted and measured.
        logs: The folder with the logs of a run that failed.
    """

    scenario: str
    kind: str
    seed: int
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    logs: str = ""

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return not self.failures
