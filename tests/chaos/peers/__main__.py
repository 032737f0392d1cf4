"""``python -m tests.chaos.peers``: plays the faults on the peers, one run at a time, and prints a table."""

from __future__ import annotations

import json
import random
import traceback
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import monotonic

import click

from tests.chaos.peers.faults import FAULTS, Fault
from tests.chaos.peers.peer import PEERS, Peer
from tests.chaos.peers.stage import Stage

_FIGURES = {
    "attempted": "attempted", "acked": "confirmed", "lost": "lost", "stuck": "stuck",
    "false_confirmations": "false confirmations", "duplicated": "ran twice", "dead": "dead",
    "unexpected": "unexpected",
}  # fmt: skip


@dataclass
class Result:
    """One run.

    Attributes:
        peer: Who was tried.
        fault: What happened to it.
        seed: What its chances came from.
        versions: Of what was tried.
        settings: What was not its default.
        promise: What its documentation says of them.
        seconds: How long it took.
        figures: What was counted and measured.
        logs: What workers and publishers printed last.
        error: Why the run came to no end; empty if it did.
    """

    peer: str
    fault: str
    seed: int
    versions: dict[str, str]
    settings: str
    promise: str
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    error: str = ""


def play(peer: Peer, fault: Fault, seed: int) -> Result:
    """Play a fault on a peer once."""
    versions = {name: version(name) for name in (*peer.packages, "redis")}
    result = Result(peer.name, fault.name, seed, versions, peer.settings, peer.promise)
    began = monotonic()
    with Stage(peer, seed, *fault.redis) as stage:
        try:
            fault.play(stage)
            stage.balance()
        except Exception:
            result.error = traceback.format_exc()
        result.figures, result.logs = stage.figures, stage.logs()
    result.seconds = round(monotonic() - began, 1)
    return result


def table(results: Iterable[Result]) -> str:
    """Return a Markdown table with one row for each fault and peer: sums over its runs."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if not result.error:
            groups[result.fault, result.peer].append(result)
    heads = ("fault", "peer", "runs", *_FIGURES.values(), "recovery")
    lines = [heads, tuple("---" if n < 2 else "---:" for n in range(len(heads)))]
    for (fault, peer), runs in sorted(groups.items(), key=lambda item: list(FAULTS).index(item[0][0])):
        sums = [f"{int(sum(run.figures[figure] for run in runs)):,}" for figure in _FIGURES]
        recoveries = [f"{run.figures['recovery']:g}" if "recovery" in run.figures else "never" for run in runs]
        lines.append((fault, peer, str(len(runs)), *sums, ", ".join(recoveries) if fault == "half-open" else ""))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@click.command()
@click.option("-p", "--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Try this one only.")
@click.option("-f", "--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), help="Play this one only.")
@click.option("-n", "--repeats", type=click.IntRange(1), default=1, show_default=True, help="Runs of each.")
@click.option("--seed", type=int, help="The first run's seed; each further run has the next. Default: by chance.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Append results, as JSON lines.")
def main(peers: Sequence[str], faults: Sequence[str], repeats: int, seed: int | None, output: Path | None) -> None:
    """Play faults on kq and its peers, on Redis servers of their own, and count what was lost and what ran twice.

    «stuck» is what was confirmed, has not ended when the run does, and is still in Redis; «lost» is no longer there.
    """
    first = random.SystemRandom().randrange(10**6) if seed is None else seed
    plays = [
        (PEERS[peer], FAULTS[fault], first + run)
        for run in range(repeats) for fault in faults or FAULTS for peer in peers or PEERS
    ]  # fmt: skip
    results: list[Result] = []
    for peer, fault, chance in plays:
        result = play(peer, fault, chance)
        results.append(result)
        figures = ", ".join(f"{key} {value:g}" for key, value in result.figures.items() if value)
        click.echo(
            f"[{len(results)}/{len(plays)}] {fault.name} on {peer.name}, seed {chance}, "
            f"{result.seconds:g} s: {figures}",
            err=True,
        )
        if result.error:
            click.echo("       " + result.error.strip().replace("\n", "\n       "), err=True)
        if output is not None:
            with output.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    click.echo(table(results))


if __name__ == "__main__":
    main()
