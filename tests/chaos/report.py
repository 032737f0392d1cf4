"""What many runs come to, as a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tests.chaos.scenario import Result

_HEADS = ("scenario", "broker", "runs", "passed", "messages", "lost", "false confirms", "ran twice", "slowest recovery")


def rows(results: Iterable[Result], order: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one row for each scenario and broker.

    Args:
        results: Of any number of runs.
        order: The scenarios' names, in the order of their rows.
    """
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.scenario, result.kind].append(result)
    found: list[tuple[str, ...]] = []
    for (name, kind), runs in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):

        def total(figure: str, runs: list[Result] = runs) -> int:
            return int(sum(run.figures.get(figure, 0) for run in runs))

        recoveries = [run.figures["recovery"] for run in runs if "recovery" in run.figures]
        found.append((
            name, kind, str(len(runs)), str(sum(run.passed for run in runs)), f"{total('attempted'):,}",
            str(total("lost")), str(total("false_confirmations")), str(total("duplicated")),
            f"{max(recoveries):.1f} s" if recoveries else "",
        ))  # fmt: skip
    return found


def table(results: Iterable[Result], order: Sequence[str]) -> str:
    """Return a table for a terminal; it is Markdown as well."""
    lines = [_HEADS, *rows(results, order)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
