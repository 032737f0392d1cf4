"""Backends that other distributions bring."""

from __future__ import annotations


def backends() -> dict[str, str]:
    """Return the ``module:class`` of each scheme that an installed distribution registers as ``kq.backends``."""
    # Imported here: to read what all distributions register takes about as long as all of kq.
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group="kq.backends")}
