"""All scenarios."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from tests.chaos import broker_faults, endurance, hostile, network_faults, process_faults, publisher_faults
from tests.chaos.scenario import Scenario

_MODULES: Final[tuple[ModuleType, ...]] = (
    process_faults,
    broker_faults,
    network_faults,
    publisher_faults,
    hostile,
    endurance,
)

#: By name, in the order of their families.
SCENARIOS: Final[dict[str, Scenario]] = {
    value.name: value for module in _MODULES for value in vars(module).values() if isinstance(value, Scenario)
}
