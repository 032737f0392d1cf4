"""The demo: start a worker, publish every file of the standard library, watch, and sum up.

scripts/demo [--broker URL] [--files N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import kq

HERE = Path(__file__).parent
#: Seconds after which the demo gives up.
PATIENCE = 300


def say(text: str = "") -> None:
    """Print a line at once."""
    print(text, flush=True)


def find_files(limit: int | None) -> list[str]:
    """Return the Python files of the running Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(str(path) for path in root.rglob("*.py") if "site-packages" not in path.parts)
    if limit is not None:
        # Keep what makes the demo worth watching.
        special = [f for f in files if f.endswith("/this.py") or "bad" in Path(f).name]
        files = sorted({*files[:limit], *special})
    return files


def watch(app: kq.App, results: Path, total: int, worker: subprocess.Popen[bytes], started: float) -> tuple[int, int]:
    """Show how far the worker is until every file is accounted for; return done and dead."""
    shown = -1
    while True:
        done = len(results.read_text().splitlines()) if results.exists() else 0
        dead = app.info("index:files").dead or 0
        share = (done + dead) / total
        if sys.stderr.isatty() or int(share * 10) > shown:
            shown = int(share * 10)
            bar = "#" * int(share * 40)
            end = "\r" if sys.stderr.isatty() else "\n"
            rate = (done + dead) / (time.monotonic() - started)
            print(f"  [{bar:40}] {done + dead:>5}/{total}  {rate:6.0f}/s ", end=end, file=sys.stderr, flush=True)
        if done + dead >= total:
            return done, dead
        if worker.poll() is not None:
            raise SystemExit(f"the worker ended early, with code {worker.returncode}")
        if time.monotonic() - started > PATIENCE:
            raise SystemExit(f"gave up after {PATIENCE} s: {done} done and {dead} dead of {total}")
        time.sleep(0.2)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", help="sqlite:///..., redis://... or amqp://...; default: a new SQLite file")
    parser.add_argument("--files", type=int, help="index only so many files")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kq-demo-"))
    try:
        run(options.broker or f"sqlite:///{folder / 'kq.db'}", options.files, folder)
    except kq.errors.Error as error:
        raise SystemExit(f"demo: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(broker: str, most: int | None, folder: Path) -> None:
    """Run the demo on a broker, with so many files at most."""
    results = folder / "index.jsonl"
    os.environ["KQ_BROKER_URL"] = broker
    os.environ["INDEX_RESULTS"] = str(results)
    sys.path.insert(0, str(HERE))
    from indexer import app

    # What an earlier demo left behind on a shared broker is not this one's to count.
    app.queue("index:files", retry=kq.Backoff(initial=0.2, factor=2, jitter="none"))
    app.publish("index:files", {"path": __file__})
    app.purge("index:files")
    app.dead("index:files").purge()

    files = find_files(most)
    say(f"kq {kq.__version__} on {kq.config.hide_password(broker)}")
    say(f"\n$ kq worker indexer:app          # 1 message a file, {len(files):,} files of Python's standard library")
    log = (folder / "worker.log").open("wb")
    command = [sys.executable, "-m", "kq", "worker", "indexer:app"]
    worker = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=log)
    try:
        started = time.monotonic()
        ids = app.publish_many("index:files", [{"path": path} for path in files])
        took = time.monotonic() - started
        say(f"  published {len(ids):,} messages in {took:.2f} s: each confirmed by the broker before it counts")
        done, dead = watch(app, results, len(files), worker, started)
        took = time.monotonic() - started
        say()
        summary(app, results, done, dead, took, len(files))
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(40)
        log.close()
        app.close()


def summary(app: kq.App, results: Path, done: int, dead: int, took: float, total: int) -> None:
    """Say what happened, in words."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    again = [row for row in rows if row["attempt"] > 1]
    functions, classes = sum(row["functions"] for row in rows), sum(row["classes"] for row in rows)
    say(f"{done:,} files indexed in {took:.1f} s ({total / took:,.0f} messages/s): "
        f"{functions:,} functions, {classes:,} classes")  # fmt: skip
    for row in again:
        say(f"retried: {Path(row['path']).name} failed twice and succeeded on attempt {row['attempt']}")
    twice = len(rows) - len({row["id"] for row in rows})
    say(f"lost: {total - len({row['id'] for row in rows}) - dead}   run twice: {twice}")
    say(f"\n$ kq dead list index:files      # {dead} that no retry can help")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    listed = subprocess.run(
        [sys.executable, "-m", "kq", "dead", "list", "index:files", "--limit", "8"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    say("\n".join("  " + line for line in listed.stdout.splitlines()))
    if dead > 8:
        say(f"  ... and {dead - 8} more")
    say("\nThe same on another broker: scripts/demo --broker redis://localhost, or amqp://localhost")


if __name__ == "__main__":
    main()
