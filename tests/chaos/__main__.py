"""``scripts/chaos``: plays scenarios, shows how far it is, and prints a table."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread

import click

from tests.chaos.catalogue import SCENARIOS
from tests.chaos.ground import Ground
from tests.chaos.report import table
from tests.chaos.scenario import SHARED, Result, Scenario
from tests.chaos.stage import SIZES, Size

#: A scenario, a broker, a seed.
Play = tuple[Scenario, str, int]


class _Player(Thread):
    """Plays what is left to be played, on brokers of its own."""

    def __init__(
        self, plays: SimpleQueue[Play], size: Size, results: SimpleQueue[Result | None], enough: Event
    ) -> None:
        super().__init__(daemon=True)
        self._plays = plays
        self._size = size
        self._results = results
        self._enough = enough

    def run(self) -> None:
        try:
            with Ground() as ground, suppress(Empty):
                while not self._enough.is_set():
                    scenario, kind, seed = self._plays.get_nowait()
                    self._results.put(ground.play(scenario, kind, seed, self._size))
        finally:
            self._results.put(None)


@click.command()
@click.option("-s", "--scenario", "names", multiple=True, type=click.Choice(list(SCENARIOS)), metavar="NAME",
              help="Play this one; may be given several times. Default: all but those that take minutes.")  # fmt: skip
@click.option("-f", "--family", "families", multiple=True, help="Play this family; may be given several times.")
@click.option("-b", "--broker", "kinds", multiple=True, type=click.Choice(SHARED), help="Play on this broker only.")
@click.option("-n", "--repeats", type=click.IntRange(1), default=1, show_default=True, help="Runs of each.")
@click.option("--seed", type=int, help="The first run's seed; each further run has the next. Default: by chance.")
@click.option("--size", type=click.Choice(list(SIZES)), default="standard", show_default=True, help="How much to play.")
@click.option("-j", "--jobs", type=click.IntRange(1), default=2, show_default=True, help="Runs at a time.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Append results, as JSON lines.")
@click.option("--from", "earlier", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Print the table of results that --output wrote, and end.")  # fmt: skip
@click.option("--list", "listing", is_flag=True, help="Print the scenarios and end.")
@click.option("-x", "--fail-fast", is_flag=True, help="End at the first run that fails.")
def main(
    names: Sequence[str], families: Sequence[str], kinds: Sequence[str], repeats: int, seed: int | None, size: str,
    jobs: int, output: Path | None, earlier: Sequence[Path], listing: bool, fail_fast: bool,
) -> None:  # fmt: skip
    """Play faults against kq on private brokers, and count what was lost and what ran twice.

    Ends with 1 if a promise was broken. A run's seed is printed and repeats its chances, though not the machine's.
    """
    chosen = [s for s in SCENARIOS.values() if (s.name in names if names else not s.long)]
    chosen = [s for s in chosen if not families or s.family in families]
    if listing:
        for s in chosen:
            click.echo(f"{s.name:36} {', '.join(s.on):24} {s.promise}")
        return
    if earlier:
        results = [Result(**json.loads(line)) for path in earlier for line in path.read_text().splitlines()]
        click.echo(table(results, list(SCENARIOS)))
        return
    # Whoever ends it, however: brokers and workers end with their runs.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    first = random.SystemRandom().randrange(10**6) if seed is None else seed
    plays: SimpleQueue[Play] = SimpleQueue()
    for play in _plays(chosen, kinds or SHARED, first, repeats):
        plays.put(play)
    total, enough = plays.qsize(), Event()
    results = []
    arriving: SimpleQueue[Result | None] = SimpleQueue()
    players = [_Player(plays, SIZES[size], arriving, enough) for _ in range(jobs)]
    for player in players:
        player.start()
    playing = len(players)
    try:
        while playing:
            result = arriving.get()
            if result is None:
                playing -= 1
                continue
            results.append(result)
            _show(result, len(results), total)
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
            if fail_fast and not result.passed:
                enough.set()
    finally:
        enough.set()
        for player in players:
            player.join()
    click.echo(table(results, list(SCENARIOS)))
    sys.exit(not all(result.passed for result in results))


def _plays(chosen: Sequence[Scenario], kinds: Sequence[str], first: int, repeats: int) -> Iterator[Play]:
    for run in range(repeats):
        for s in chosen:
            for kind in s.on:
                if kind in kinds:
                    yield s, kind, first + run


def _show(result: Result, count: int, total: int) -> None:
    mark = "ok  " if result.passed else "FAIL"
    figures = ", ".join(f"{key} {value:g}" for key, value in result.figures.items() if value or key == "lost")
    click.echo(
        f"[{count}/{total}] {mark} {result.scenario} on {result.kind}, seed {result.seed}, "
        f"{result.seconds:.1f} s: {figures}",
        err=True,
    )
    for failure in result.failures:
        click.echo("       " + failure.strip().replace("\n", "\n       "), err=True)
    if result.logs:
        click.echo(f"       logs: {result.logs}", err=True)


if __name__ == "__main__":
    main()
