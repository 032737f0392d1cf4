"""Plays scenarios, one after the other, on brokers that are kept from one to the next."""

from __future__ import annotations

import traceback
from contextlib import suppress
from time import monotonic

from tests.chaos.scenario import Result, Scenario
from tests.chaos.site import Site, make
from tests.chaos.stage import Broken, Size, Stage


class Ground:
    """Brokers of our own, by kind and by what they were started with. Use it as a context manager."""

    def __init__(self) -> None:
        self._sites: dict[tuple[str, tuple[str, ...]], Site] = {}

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all brokers."""
        while self._sites:
            self._sites.popitem()[1].close()

    def play(self, scenario: Scenario, kind: str, seed: int, size: Size) -> Result:
        """Play a scenario once, and return what became of it."""
        result = Result(scenario.name, kind, seed)
        began = monotonic()
        stage: Stage | None = None
        key = (kind, scenario.arguments(kind))
        try:
            site = self._sites.get(key) or make(kind, *key[1])
            self._sites[key] = site
            site.start()
            stage = Stage(site, seed=seed, size=size, wired=scenario.wired)
            scenario.play(stage)
        except Broken as broken:
            result.failures.append(str(broken))
        except Exception:
            result.failures.append(traceback.format_exc())
        result.seconds = monotonic() - began
        if stage is not None:
            result.failures += stage.failures
            result.figures = stage.figures
            if result.failures:
                result.logs = str(stage.folder)
            stage.close(keep=bool(result.failures))
        if result.failures:
            # Whatever state it is in, the next run is not to suffer from it.
            with suppress(Exception):
                self._sites.pop(key).close()
        return result
