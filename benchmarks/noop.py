"""The app of the benchmark: a handler that does nothing, and one that tells when it has seen the last."""

import os

import kq

app = kq.App("bench")
QUEUE = os.environ.get("BENCH_QUEUE", "bench:noop")


@app.consumer(QUEUE)
def noop(payload):
    """Do nothing."""
