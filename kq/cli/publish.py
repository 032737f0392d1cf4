"""``kq publish``."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from kq.cli.option import DURATION, FAILED, PAIR, USAGE, common, exit_code, fail, find_app, pairs, stop_writing, warn
from kq.errors import Error, Invalid

if TYPE_CHECKING:
    from kq.app import App

#: Lines that are published together.
_BATCH = 500
#: How much alike two names are, from 0 to 1, of which one may be a slip of the other.
_NEAR = 0.85


@click.command()
@click.argument("queue")
@click.argument("data", required=False, metavar="[JSON | -]")
@click.option("--jsonl", type=click.File("rb"), metavar="FILE", envvar="KQ_JSONL", show_envvar=True,
              help="Publish one message for each line of a file (- for stdin).")  # fmt: skip
@click.option("-H", "--header", "headers", multiple=True, type=PAIR, metavar="K=V", envvar="KQ_HEADER",
              show_envvar=True, help="A header; K=V is text, K:=V is JSON. May be given several times.")  # fmt: skip
@click.option("--delay", type=DURATION, envvar="KQ_DELAY", show_envvar=True, help="Hold it back, e.g. 5s or 2h.")
@click.option("--expires", type=DURATION, envvar="KQ_EXPIRES", show_envvar=True,
              help="Dead-letter it instead of running it after this long.")  # fmt: skip
@click.option("--priority", metavar="0-9|NAME", envvar="KQ_PRIORITY", show_envvar=True,
              help="low, normal, high, critical, or 0 to 9.")  # fmt: skip
@click.option("--message-id", metavar="ID", envvar="KQ_MESSAGE_ID", show_envvar=True, help="An id of your own.")
@common
def publish(
    queue: str,
    data: str | None,
    jsonl: BinaryIO | None,
    headers: tuple[str, ...],
    delay: float | None,
    expires: float | None,
    priority: str | None,
    message_id: str | None,
    app_path: str | None,
    broker: str | None,
) -> None:
    """Publish one message, or one for each line of a file, and print each one's id.

    With --jsonl on a terminal a progress bar takes the place of the ids.
    """
    if (data is None) == (jsonl is None):
        raise click.UsageError("give either a JSON value (- reads it from stdin) or --jsonl FILE")
    if jsonl is not None and message_id is not None:
        raise click.UsageError("--message-id is for a single message")
    chosen = _headers(headers, priority)
    app = find_app(app_path, broker)
    with app:
        if jsonl is not None:
            _warn_of_name(app, queue)
            _publish_lines(app, queue, jsonl, chosen, {"delay": delay, "expires": expires})
            return
        text = ""
        try:
            text = sys.stdin.read().removeprefix("\ufeff") if data == "-" else str(data)
            payload = json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = f"; a text needs quotes of its own: '\"{text}\"'" if text[:1].isalpha() else ""
            fail(f"the data is not JSON: {error}{hint}", USAGE)
        _warn_of_memory(app, queue)
        _warn_of_name(app, queue)
        click.echo(app.publish(queue, payload, chosen, delay=delay, expires=expires, message_id=message_id))


def _warn_of_memory(app: App, queue: str) -> None:
    if not app.registry.backend(app.registry.spec(queue).driver).capabilities.shared:
        warn(
            "nobody else sees this message, and it is gone when this command ends: the broker is this process's memory"
        )


def _warn_of_name(app: App, queue: str) -> None:
    """Say so where the queue is nearly one that the app knows: to publish to it makes it, and nobody may consume it."""
    known = [spec.id for spec in app.registry.queues()]
    near = difflib.get_close_matches(queue, known, 1, _NEAR)
    if near and queue not in known:
        warn(f"the app knows no queue {queue}; did you mean {near[0]}?")


def _publish_lines(app: App, queue: str, lines: BinaryIO, headers: dict[str, Any], options: dict[str, Any]) -> None:
    published = 0
    started = monotonic()
    batch: list[Any] = []
    # Ids are for programs; a person gets a progress bar instead.
    on_terminal = sys.stdout.isatty()

    def send() -> None:
        nonlocal published
        ids = app.publish_many(queue, batch, headers, **options)
        published += len(batch)
        batch.clear()
        if not on_terminal:
            click.echo("\n".join(ids) if ids else "", nl=bool(ids))

    def pace(_: Any) -> str:
        return f"{published:,} published, {published / max(0.001, monotonic() - started):,.0f}/s"

    bar: Any = (
        click.progressbar(
            length=_count_lines(lines), label=queue, file=sys.stderr, show_pos=True, item_show_func=pace,
            update_min_steps=_BATCH,
        )
        if sys.stderr.isatty()
        else nullcontext()
    )  # fmt: skip
    number = 0
    try:
        with bar as progress:
            for number, payload in _payloads(lines):  # noqa: B007 - the last one is named in errors
                batch.append(payload)
                if len(batch) == _BATCH:
                    send()
                if progress is not None:
                    progress.update(1, payload)
            send()
    except _BadLine as error:
        # What came before the bad line is good; it is sent, and said to be.
        try:
            send()
        except Error as later:
            fail(f"{later.message}; {_so_far(published, later)}", exit_code(later))
        fail(f"{error}; {_were(published)} published, nothing after that line", USAGE)
    except Invalid as error:
        first = number - len(batch) + 1
        fail(f"lines {first} to {number}: {error.message}; {_so_far(published, error)}", USAGE)
    except Error as error:
        fail(f"{error.message}; {_so_far(published, error)}", exit_code(error))
    except BrokenPipeError:
        # What the reader of the ids wanted is not what this was to do.
        stop_writing()
        fail(f"nobody reads the ids any more; {_were(published)} published, nothing after that", FAILED)
    click.echo(pace(None), err=True)


class _BadLine(Exception):
    """A line that is no message."""


def _payloads(lines: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield line numbers and payloads; blank lines are passed over."""
    from kq import codec

    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            payload = json.loads(text)
            if codec.is_empty(payload):
                raise _BadLine(f"line {number} is empty data ({text.strip()})")
            codec.JSON.encode(payload)
        except json.JSONDecodeError as error:
            # Its own number of a line is always 1.
            raise _BadLine(f"line {number} is not JSON: {error.msg}, at column {error.colno}") from None
        except (ValueError, RecursionError, Invalid) as error:
            raise _BadLine(f"line {number} is not a message: {error}") from None
        yield number, payload


def _so_far(published: int, error: Error) -> str:
    total = published + len(error.details.get("published", ()))
    return f"{_were(total)} published before that"


def _were(count: int) -> str:
    return "1 message was" if count == 1 else f"{count:,} messages were"


def _count_lines(lines: BinaryIO) -> int | None:
    if not lines.seekable():
        return None
    count = sum(1 for line in lines if line.strip())
    lines.seek(0)
    return count


def _headers(texts: tuple[str, ...], priority: str | None) -> dict[str, Any]:
    headers = pairs("-H", texts)
    if str(headers.get("priority", "")).isdigit():
        headers["priority"] = int(headers["priority"])
    if priority is not None:
        headers["priority"] = int(priority) if priority.isdigit() else priority
    return headers
