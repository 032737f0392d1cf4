"""What was measured, as a table, as JSON and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.contender import BARE
from benchmarks.trial import FIGURES, SCALE_FIGURES

_LIMIT: Final = BARE.name
_OURS: Final = "kq"


@dataclass
class Results:
    """What was measured.

    Attributes:
        about: The machine, versions, guarantees and settings.
        values: By broker, contender and figure, one value for each repeat.
        failed: What could not be measured, and why.
    """

    about: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, broker: str, contender: str, found: Mapping[str, float]) -> None:
        """Add the figures of one repeat."""
        for figure, value in found.items():
            self.values.setdefault(broker, {}).setdefault(contender, {}).setdefault(figure, []).append(value)

    def median(self, broker: str, contender: str, figure: str) -> float | None:
        """Return a median; None if it was not measured."""
        values = self.values.get(broker, {}).get(contender, {}).get(figure)
        return statistics.median(values) if values else None


def shown(value: float) -> str:
    """Return a figure with three digits that matter."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(values: Sequence[float]) -> str:
    middle = shown(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({shown(min(values))}-{shown(max(values))})"


def _ratio(ours: float, other: float, more: bool) -> float:
    """Return how many times better ours is."""
    return ours / other if more else other / ours


def table(results: Results, broker: str) -> str:
    """Return a Markdown table of one broker: a row for each figure, medians with lowest and highest, and ratios."""
    found = results.values[broker]
    names = [name for name in found if name != _LIMIT]
    settings = sorted({_setting(name) for name in names})
    heads = [f"{_OURS}{setting} to the best other" for setting in settings]
    rows: list[Sequence[str]] = [("", *names, *heads, "kq to a bare client")]
    for key, figure in FIGURES.items():
        if not any(key in found[name] for name in names):
            continue
        cells = [_spread(found[name][key]) if key in found[name] else "" for name in names]
        ours = results.median(broker, _OURS, key)
        limit = results.median(broker, _LIMIT, key)
        to_limit = f"{_ratio(ours, limit, figure.more):.2f} x" if ours and limit else ""
        to_best = [_to_the_best(results, broker, key, setting) for setting in settings]
        rows.append((f"{figure.title} ({figure.unit})", *cells, *to_best, to_limit))
    return _markdown(rows)


def _setting(name: str) -> str:
    """Return by what a contender differs from the one of its name: ``-classic``; empty if by nothing."""
    _, hyphen, setting = name.partition("-")
    return hyphen + setting


def _to_the_best(results: Results, broker: str, key: str, setting: str) -> str:
    """Return how kq compares to the best of those with the same setting, for they promise the same."""
    more = FIGURES[key].more
    ours = results.median(broker, _OURS + setting, key)
    others = [
        value for name in results.values[broker]
        if name not in (_LIMIT, _OURS + setting) and _setting(name) == setting
        and (value := results.median(broker, name, key)) is not None
    ]  # fmt: skip
    return f"{_ratio(ours, max(others) if more else min(others), more):.2f} x" if ours and others else ""


def scale_table(results: Results) -> str:
    """Return a Markdown table of what kq alone is measured at: a row for each figure, a column for each broker."""
    found = {broker: values[_OURS] for broker, values in results.values.items() if _OURS in values}
    rows: list[Sequence[str]] = [("", *found)]
    for key, figure in SCALE_FIGURES.items():
        cells = [_spread(values[key]) if key in values else "" for values in found.values()]
        if any(cells):
            rows.append((f"{figure.title} ({figure.unit})", *cells))
    return _markdown(rows) if len(rows) > 1 else ""


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "| --- |" + " --: |" * (len(rows[0]) - 1), *rest])


def chart(results: Results, path: Path) -> None:
    """Draw bars for the figures that people ask for first; the file's ending says SVG or PNG.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the extra ``bench`` brings it.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    keys = [key for key in ("drain", "publish", "bulk", "idle-p50") if key in FIGURES]
    # Who is alone is compared with nobody.
    brokers = [broker for broker, found in results.values.items() if len(found.keys() - {_LIMIT}) > 1]
    figure, axes = pyplot.subplots(
        len(brokers), len(keys), figsize=(4.2 * len(keys), 0.6 + 2.4 * len(brokers)), squeeze=False
    )
    for row, broker in enumerate(brokers):
        names = [name for name in results.values[broker] if name != _LIMIT][::-1]
        for column, key in enumerate(keys):
            axis = axes[row][column]
            values = [results.median(broker, name, key) or 0.0 for name in names]
            bars = axis.barh(
                names, values, color=["#d1495b" if name.startswith(_OURS) else "#8d99ae" for name in names]
            )
            axis.bar_label(bars, [shown(value) if value else "" for value in values], padding=3, fontsize=8)
            less = "" if FIGURES[key].more else ", less is better"
            axis.set_title(f"{broker}: {FIGURES[key].title} ({FIGURES[key].unit}{less})", fontsize=8)
            axis.margins(x=0.2)
            axis.set_xticks([])
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
