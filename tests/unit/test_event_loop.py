"""Async handlers beside each other on one event loop."""

from __future__ import annotations

import asyncio
from threading import Event
from typing import Any

import kq


def test_a_handler_that_has_returned_is_done_whoever_cancels_what_is_left_of_it() -> None:
    """A handler that cancels whatever there is may meet what only hands another one's result over."""
    ran: list[str] = []
    begun, ended = Event(), Event()
    waits: list[asyncio.Future[None]] = []
    tasks: set[asyncio.Task[Any]] = set()
    with kq.App("loop", broker="memory://event-loop") as app:
        app.queue("app:q", retry=kq.Backoff(initial=0.01))

        @app.consumer("app:q")
        async def handle(payload: str) -> None:
            ran.append(payload)
            if payload == "first":
                # Nothing else runs yet: these two are its own.
                tasks.update(asyncio.all_tasks())
                waits.append(asyncio.get_running_loop().create_future())
                begun.set()
                await waits[0]
                return
            waits[0].set_result(None)
            # The first one returns, and nobody has heard of it yet.
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            ended.set()

        with app.worker(concurrency=2):
            app.publish("app:q", "first")
            assert begun.wait(20)
            app.publish("app:q", "second")
            assert ended.wait(20)
        assert app.drain(20) == 0
        assert app.info("app:q").message_count == 0
        assert app.dead("app:q").list() == []
    assert ran == ["first", "second"]
