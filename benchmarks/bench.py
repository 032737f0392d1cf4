"""First figures: how fast kq publishes and drains, on each broker, on this machine.

    scripts/bench [--broker URL ...] [--messages N] [--repeats N]

Drain: a queue of no-op messages is filled; a worker of two processes with eight handlers each is started;
time counts from the first message done to the last, so that the start of processes is not in it. Medians of
several repeats, with the spread; brokers take turns, so that the machine's mood spreads evenly.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from uuid import uuid4

import kq
from kq.config import hide_password

HERE = Path(__file__).parent
#: Seconds after which a repeat is given up.
PATIENCE = 120


def measure(broker: str, messages: int, singles: int) -> dict[str, float]:
    """Return rates of one repeat: published one by one, published in bulk, drained."""
    queue = f"bench:{uuid4().hex[:12]}"
    figures: dict[str, float] = {}
    with kq.App("bench", broker=broker) as app:
        app.publish(queue, {"n": 0})
        started = time.perf_counter()
        for n in range(singles):
            app.publish(queue, {"n": n})
        figures["publish/s"] = singles / (time.perf_counter() - started)
        app.purge(queue)
        payloads = [{"n": n, "text": "x" * 80} for n in range(messages)]
        started = time.perf_counter()
        for i in range(0, messages, 1000):
            app.publish_many(queue, payloads[i : i + 1000])
        figures["publish_many/s"] = messages / (time.perf_counter() - started)
        figures["drain/s"] = drain(app, queue, broker, messages)
        app.purge(queue)
    return figures


def drain(app: kq.App, queue: str, broker: str, messages: int) -> float:
    """Return the rate at which a worker of two processes empties a queue."""
    environment = {**os.environ, "KQ_BROKER_URL": broker, "BENCH_QUEUE": queue, "KQ_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "kq", "worker", "noop:app", "-p", "2", "-c", "8"]
    worker = subprocess.Popen(command, cwd=HERE, env=environment, stderr=subprocess.DEVNULL)
    try:
        left = messages
        until = time.monotonic() + PATIENCE
        while left == messages:
            left = app.info(queue).message_count
            if time.monotonic() > until:
                raise SystemExit(f"{hide_password(broker)}: the worker does not start")
        first_at, first_left = time.perf_counter(), left
        while left:
            time.sleep(0.01)
            left = app.info(queue).message_count
            if time.monotonic() > until:
                raise SystemExit(f"{hide_password(broker)}: {left} messages left after {PATIENCE} s")
        return first_left / max(1e-6, time.perf_counter() - first_at)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", action="append", help="a broker's URL; may be given several times")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--singles", type=int, default=500, help="messages published one by one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        brokers = options.broker or ["redis://127.0.0.1", "amqp://127.0.0.1", f"sqlite:///{folder}/bench.db"]
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for repeat in range(options.repeats):
            for broker in brokers:
                shown = hide_password(broker).partition(":")[0]
                print(f"repeat {repeat + 1} of {options.repeats}: {shown}", file=sys.stderr)
                for name, rate in measure(broker, options.messages, options.singles).items():
                    found[shown][name].append(rate)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'broker':10}{'figure':18}{'median':>10}{'lowest':>10}{'highest':>10}")
    for broker, figures in found.items():
        for name, rates in figures.items():
            row = (statistics.median(rates), min(rates), max(rates))
            print(f"{broker:10}{name:18}" + "".join(f"{rate:>10,.0f}" for rate in row))


if __name__ == "__main__":
    main()
