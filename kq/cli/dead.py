"""``kq dead list | show | replay | purge``."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from typing import TYPE_CHECKING, Any

import click

from kq.cli.option import FAILED, common, confirm, fail, find_app, printable, table
from kq.errors import NotFound

if TYPE_CHECKING:
    from kq.app import App
    from kq.dead_letter import DeadLetter


@click.group()
def dead() -> None:
    """Look at messages that could not be handled, send them back, or drop them."""


@dead.command("list")
@click.argument("queue")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, envvar="KQ_LIMIT", show_envvar=True,
              help="How many at most.")  # fmt: skip
@click.option("--offset", type=click.IntRange(0), default=0, envvar="KQ_OFFSET", show_envvar=True,
              help="How many to pass over.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, envvar="KQ_JSON", show_envvar=True, help="Print a JSON list.")
@common
def list_(queue: str, limit: int, offset: int, as_json: bool, app_path: str | None, broker: str | None) -> None:
    """List the dead letters of QUEUE, oldest first."""
    with find_app(app_path, broker) as app:
        letters = app.dead(queue).list(limit, offset)
        total = None if as_json else _total(app, queue)
    if as_json:
        click.echo(json.dumps([_fields(letter) for letter in letters]))
        return
    if not letters:
        click.echo(f"no dead letters of {queue}" + (" beyond that offset" if offset else ""))
        return
    table(
        ["id", "reason", "attempts", "dead since", "payload", "error"],
        [
            [
                letter.id,
                letter.reason,
                letter.attempts,
                None if letter.dead_at is None else letter.dead_at.strftime("%Y-%m-%d %H:%M:%S"),
                _brief(letter),
                letter.error_message,
            ]
            for letter in letters
        ],
    )
    if total is not None and total > offset + len(letters):
        click.echo(f"{offset + len(letters)} of {total}; --offset {offset + len(letters)} shows more", err=True)


@dead.command()
@click.argument("queue")
@click.argument("message_id")
@click.option("--json", "as_json", is_flag=True, envvar="KQ_JSON", show_envvar=True, help="Print a JSON object.")
@common
def show(queue: str, message_id: str, as_json: bool, app_path: str | None, broker: str | None) -> None:
    """Show one dead letter of QUEUE, with its payload and its error."""
    with find_app(app_path, broker) as app:
        letter = app.dead(queue).get(message_id)
    if as_json:
        click.echo(json.dumps(_fields(letter)))
        return
    fields = _fields(letter)
    if letter.payload is None:
        fields["body"] = repr(letter.body[:2000])
    else:
        del fields["body"]
        fields["payload"] = json.dumps(fields["payload"], indent=2, ensure_ascii=False)
    for name, value in fields.items():
        if value not in (None, {}, ""):
            text = "\n  ".join(printable(line.expandtabs()) for line in str(value).splitlines())
            click.echo(f"{name:16}{text}")


@dead.command()
@click.argument("queue")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@click.option(
    "--all", "everything", is_flag=True, envvar="KQ_ALL", show_envvar=True, help="All of them; as without ids."
)
@common
def replay(queue: str, ids: tuple[str, ...], everything: bool, app_path: str | None, broker: str | None) -> None:
    """Send dead letters back to QUEUE, all of them or those of the IDs; they start again at attempt 1."""
    _either(ids, everything)
    with find_app(app_path, broker) as app:
        replayed = app.dead(queue).replay(ids or None)
    click.echo(f"{replayed} replayed")
    _all_found(queue, ids, replayed)


@dead.command("purge")
@click.argument("queue")
@click.argument("ids", nargs=-1, metavar="[ID...]")
@click.option(
    "--all", "everything", is_flag=True, envvar="KQ_ALL", show_envvar=True, help="All of them; as without ids."
)
@click.option("--yes", is_flag=True, envvar="KQ_YES", show_envvar=True, help="Do not ask.")
@common
def purge(
    queue: str, ids: tuple[str, ...], everything: bool, yes: bool, app_path: str | None, broker: str | None
) -> None:
    """Drop dead letters of QUEUE for good, all of them or those of the IDs."""
    _either(ids, everything)
    confirm(f"Drop {len(ids) or 'all'} dead letters of {queue} for good?", yes)
    with find_app(app_path, broker) as app:
        dropped = app.dead(queue).purge(ids or None)
    click.echo(f"{dropped} dropped")
    _all_found(queue, ids, dropped)


def _either(ids: tuple[str, ...], everything: bool) -> None:
    if ids and everything:
        raise click.UsageError("expected ids, or --all, got both")


def _all_found(queue: str, ids: tuple[str, ...], found: int) -> None:
    missing = len(set(ids)) - found
    if missing > 0:
        fail(
            f"{missing} of {len(set(ids))} ids are no dead letters of {queue}; kq dead list {queue} shows them", FAILED
        )


def _fields(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "queue_id": letter.queue_id,
        "payload": _jsonable(letter.payload),
        "body": b64encode(letter.body).decode(),
        "headers": _jsonable(letter.headers),
        "reason": letter.reason,
        "attempts": letter.attempts,
        "error_kind": letter.error_kind,
        "error_message": letter.error_message,
        "dead_at": None if letter.dead_at is None else letter.dead_at.isoformat(),
        "crashes": letter.crashes,
        "exit_code": letter.exit_code,
        "exit_signal": letter.exit_signal,
        "peak_memory": letter.peak_memory,
        "error_traceback": letter.error_traceback,
    }


def _jsonable(value: Any) -> Any:
    """Return a value as JSON has it, whatever a stranger has put into it."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _total(app: App, queue: str) -> int | None:
    """Return how many dead letters there are; None where nobody knows, as of a queue that is gone."""
    try:
        return app.info(queue).dead
    except NotFound:
        return None


def _brief(letter: DeadLetter) -> str:
    if letter.payload is None:
        return repr(letter.body[:60])
    return json.dumps(_jsonable(letter.payload), ensure_ascii=False)
