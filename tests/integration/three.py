"""An app with queues on three brokers, which pass messages on to each other."""

import json
import os
import time

import kq
from kq import queue

BASE = os.environ["KQ_TEST_QUEUE"]
HERE, REDIS, RABBIT = BASE + "-here", BASE + "-redis", BASE + "-rabbit"

app = kq.App(
    "shop",
    drivers={
        "redis": os.environ["KQ_TEST_REDIS_URL"],
        "rabbit": kq.Driver(os.environ["KQ_TEST_AMQP_URL"], virtual_host="/", connection_name="three"),
    },
)
app.queue(HERE)
app.queue(REDIS, driver="redis", max_attempts=1)
app.queue(RABBIT, driver="rabbit")
_history = os.open(os.environ["KQ_TEST_HISTORY"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


@app.consumer(HERE)
@app.consumer(REDIS)
@app.consumer(RABBIT)
def handle(payload):
    """Write it down, and pass it on once all the other brokers' queues have been empty for a while."""
    me = queue.message().queue_id()
    time.sleep(payload.get("seconds", 0))
    if payload.get("fail"):
        raise RuntimeError("as told")
    if payload.get("hops"):
        onwards = {HERE: REDIS, REDIS: RABBIT, RABBIT: HERE}[me]
        queue.publish(onwards, {**payload, "hops": payload["hops"] - 1})
    os.write(_history, json.dumps({"event": me, "n": payload["n"]}).encode() + b"\n")
