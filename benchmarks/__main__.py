"""``scripts/bench``: measures kq and its peers side by side, shows how far it is, and prints tables."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from compileall import compile_dir
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.bare import DRAINS
from benchmarks.contender import BARE, CONTENDERS
from benchmarks.measure import ROOT, GivenUp
from benchmarks.report import Results, chart, scale_table, table
from benchmarks.trial import FIGURES, LIMITS, SCALE, TRIALS, Size
from tests.proxy import Proxy

_URLS = {"redis": "redis://127.0.0.1", "rabbitmq": "amqp://guest:guest@127.0.0.1"}
_NAMES = sorted({contender.name for contenders in CONTENDERS.values() for contender in contenders})


@click.command()
@click.option("-b", "--broker", "brokers", multiple=True, type=click.Choice(list(CONTENDERS)), help="Default: all.")
@click.option("-c", "--contender", "names", multiple=True, type=click.Choice(_NAMES), help="Default: all installed.")
@click.option(
    "-t", "--trial", "trials", multiple=True, type=click.Choice([*TRIALS, *SCALE]), help="Default: all of peers."
)
@click.option("--scale", is_flag=True, help="Measure kq alone: large backlogs, many queues, several supervisors.")
@click.option("-n", "--messages", type=click.IntRange(100), default=20_000, show_default=True, help="Of a backlog.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--redis", "redis_url", envvar="KQ_TEST_REDIS_URL", default=_URLS["redis"], show_default=True, metavar="URL"
)
@click.option(
    "--rabbitmq", "rabbitmq_url", envvar="KQ_TEST_AMQP_URL", default=_URLS["rabbitmq"], show_default=True, metavar="URL"
)
@click.option(
    "--distance", type=click.FloatRange(0, 1000), default=0.0, metavar="MS",
    help="Have Redis and RabbitMQ as far away as a network whose round trip takes so many milliseconds.",
)  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures.")
@click.option("--chart", "chart_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw: an SVG or a PNG.")
@click.option("--from", "earlier", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Measure nothing: take what --json wrote.")  # fmt: skip
def main(
    brokers: Sequence[str], names: Sequence[str], trials: Sequence[str], scale: bool, messages: int, repeats: int,
    redis_url: str, rabbitmq_url: str, distance: float, json_path: Path | None, chart_path: Path | None,
    earlier: Path | None,
) -> None:  # fmt: skip
    """Measure kq and other task queues on the same work, in turn, on brokers that run.

    Each has the settings that its documentation recommends, two worker processes, a queue of its own and a publisher in
    a process of its own. Medians are printed, with the lowest and the highest of all repeats.
    """
    if earlier is not None:
        results = Results(**json.loads(earlier.read_text()))
    else:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kq-bench-"))
            servers = {"redis": redis_url, "rabbitmq": rabbitmq_url}
            if distance:
                servers = {name: stack.enter_context(_far(url, distance)) for name, url in servers.items()}
            urls = {**servers, "sqlite": f"sqlite:///{folder}/bench.db"}
            chosen = trials or list(SCALE if scale else TRIALS)
            results = Results()
            for _ in measure(results, urls, brokers or list(CONTENDERS), names, chosen, messages, repeats):
                # After each repeat: a run may be long, and end before its time.
                _write(results, json_path)
    _write(results, json_path)
    if chart_path is not None:
        chart(results, chart_path)
    for broker, found in results.values.items():
        if any(key in FIGURES for figures in found.values() for key in figures):
            click.echo(f"\n{broker}\n\n{table(results, broker)}")
    if text := scale_table(results):
        click.echo(f"\nkq at scale\n\n{text}")
    for text in results.failed:
        click.echo(f"\nnot measured: {text}")


@contextmanager
def _far(url: str, distance: float) -> Iterator[str]:
    """Pass a broker's connections on, each piece half of so many milliseconds later, and yield its URL then."""
    with closing(Proxy(url)) as proxy:
        proxy.delay_up = proxy.delay_down = distance / 2000
        yield proxy.url


def _write(results: Results, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def _compile() -> None:
    """Have kq and the benchmark compiled beforehand, as what pip installs is, also where Python is told not to."""
    # The backends for themselves: compiling does not follow the link to them.
    for folder in ("kq", "kq/backends", "benchmarks"):
        compile_dir(ROOT / folder, quiet=1)


def measure(
    results: Results,
    urls: dict[str, str],
    brokers: Sequence[str],
    names: Sequence[str],
    trials: Sequence[str],
    messages: int,
    repeats: int,
) -> Iterator[int]:
    """Measure, and yield after each repeat.

    Contenders take turns within each trial, so that the machine's mood spreads evenly.
    """
    size = Size(messages, max(100, messages // 40))
    results.about = {"cores": os.cpu_count(), "python": platform.python_version(), "size": asdict(size)}
    chosen = {
        broker: [c for c in CONTENDERS[broker] if c.installed and (not names or c.name in names)] for broker in brokers
    }
    results.about["contenders"] = {
        f"{contender.name} on {broker}": {"versions": contender.versions, "guarantee": contender.guarantee}
        for broker in brokers
        for contender in chosen[broker]
    }
    _compile()
    left = repeats * sum(len(trials) * len(chosen[broker]) for broker in brokers)
    for repeat in range(repeats):
        for broker in brokers:
            for trial in trials:
                if broker in DRAINS and trial in LIMITS:
                    results.add(broker, BARE.name, LIMITS[trial](broker, urls[broker], size))
                turn = repeat % max(1, len(chosen[broker]))
                for contender in chosen[broker][turn:] + chosen[broker][:turn]:
                    try:
                        found = {**TRIALS, **SCALE}[trial](contender, urls[broker], size)
                    except GivenUp as error:
                        results.failed.append(f"{trial} of {contender.name} on {broker}: {error}")
                        found = {}
                    results.add(broker, contender.name, found)
                    left -= 1
                    if found:
                        figures = ", ".join(f"{key} {value:,.4g}" for key, value in found.items())
                        click.echo(f"[{left} left] {broker} {trial} {contender.name}: {figures}", err=True)
        # In the order of the contenders, whoever began.
        for broker in brokers:
            found_on = results.values.get(broker, {})
            order = [contender.name for contender in chosen[broker]] + [BARE.name]
            results.values[broker] = {name: found_on[name] for name in order if name in found_on}
        yield repeat


if __name__ == "__main__":
    sys.exit(main())
