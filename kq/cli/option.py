"""What the commands share: options, durations, the app, errors as exit codes, tables."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import enumerate as enumerate_threads
from threading import main_thread
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

from kq import errors, limit

if TYPE_CHECKING:
    from kq.app import App
    from kq.security import Actor

_F = TypeVar("_F", bound=Callable[..., Any])

# sysexits.h
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 69
REFUSED: Final = 77
CONFIGURATION: Final = 78


class Duration(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Seconds, or a number with ms, s, m, h or d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the duration in seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        seconds = limit.duration(str(value))
        if seconds is None:
            self.fail(f"expected a duration such as 5, 5s, 250ms, 10m, 2h or 1d; got {value!r}", param, ctx)
        return seconds


DURATION: Final = Duration()


class Pair(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``K=V``; in the environment one on each line, for a value may have blanks."""

    name = "pair"

    def split_envvar_value(self, rv: str) -> list[str]:
        """Return what a variable holds."""
        return [line for line in rv.splitlines() if line.strip()]


PAIR: Final = Pair()


class ConfigurationError(click.ClickException):
    """The app or its settings are not usable."""

    exit_code = CONFIGURATION

    def show(self, file: Any = None) -> None:
        """Print it as every other error is."""
        click.echo(f"kq: {self.message}", file=file, err=True)


def common(command: _F) -> _F:
    """Add what every command takes (app, broker, file, actor, ``--debug``), and turn its errors into exit codes."""

    @click.option("-A", "--app", "app_path", metavar="APP", envvar="KQ_APP", show_envvar=True,
                  help="The app, as package.module:attribute.")  # fmt: skip
    @click.option(
        "-b",
        "--broker",
        metavar="URL",
        help="The broker's URL; wins over the app's own, which wins over the variable.  [env var: KQ_BROKER_URL]",
    )
    @click.option(
        "--config",
        metavar="FILE",
        envvar="KQ_CONFIG",
        show_envvar=True,
        is_eager=True,
        expose_value=False,
        callback=_use_file,
        help="The configuration file; default: kq.yaml.",
    )
    @click.option(
        "--actor",
        metavar="ID",
        envvar="KQ_ACTOR",
        show_envvar=True,
        help="Who acts, for the app's policies; a worker consumes and runs handlers as this one.",
    )
    @click.option(
        "--groups",
        metavar="G,G",
        envvar="KQ_GROUPS",
        show_envvar=True,
        help="The groups of the actor, separated by commas.",
    )
    @click.option(
        "--actor-meta",
        multiple=True,
        type=PAIR,
        metavar="K=V",
        envvar="KQ_ACTOR_META",
        show_envvar=True,
        help="What is known of the actor; K=V is text, K:=V is JSON. May be given several times.",
    )
    @click.option("--debug", is_flag=True, envvar="KQ_DEBUG", show_envvar=True, help="Show tracebacks.")
    @functools.wraps(command)
    def run(
        *args: Any, debug: bool, actor: str | None, groups: str | None, actor_meta: tuple[str, ...], **kwargs: Any
    ) -> Any:
        try:
            click.get_current_context().obj = _acting_as(actor, groups, actor_meta)
            with _ending():
                return command(*args, **kwargs)
        except errors.Error as error:
            if debug:
                traceback.print_exc()
            end(error)
        except BrokenPipeError:
            # The reader of our output has gone; it has what it wanted.
            stop_writing()
            sys.exit(0)
        except ConfigurationError:
            if debug:
                traceback.print_exc()
            raise
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if debug:
                traceback.print_exc()
            fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", FAILED)

    return run  # type: ignore[return-value]


@contextmanager
def _ending() -> Iterator[None]:
    """Run a command; threads that its app has started, and never ends, do not hold it up after that."""
    try:
        yield
    except errors.Error as error:
        _end_in_time(exit_code(error))
        raise
    except BaseException as error:
        # As click, or the interpreter, ends with it.
        code = getattr(error, "code", getattr(error, "exit_code", FAILED))
        _end_in_time(code if isinstance(code, int) else FAILED)
        raise
    _end_in_time(0)


def _end_in_time(code: int) -> None:
    if any(not thread.daemon and thread is not main_thread() for thread in enumerate_threads()):
        from kq.worker.ending import end_in_time

        end_in_time(code)


def stop_writing() -> None:
    """Have nothing more written to a pipe that nobody reads, not even at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True, slots=True)
class Acting:
    """Who gives a command.

    Attributes:
        actor: None where nobody is named.
        groups: Whose policies count.
    """

    actor: Actor | None
    groups: tuple[str, ...]


def _acting_as(id: str | None, groups: str | None, meta: tuple[str, ...]) -> Acting:
    """Return who gives the command; a worker and its children find the same in the environment."""
    if id is None:
        if meta:
            raise click.UsageError("--actor-meta is about an actor: give --actor as well")
        if groups is not None and _is_given("groups"):
            raise click.UsageError("--groups are those of an actor: give --actor as well")
        return Acting(None, ())
    os.environ["KQ_ACTOR"] = id
    if groups is not None:
        os.environ["KQ_GROUPS"] = groups
    names = tuple(name.strip() for name in (groups or "").split(",") if name.strip())
    from kq.security import Actor

    return Acting(Actor(id, pairs("--actor-meta", meta)), names)


def _is_given(option: str) -> bool:
    """Tell whether an option stands on the command line."""
    return click.get_current_context().get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


def pairs(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return what ``K=V`` (text) and ``K:=V`` (JSON) say, by name."""
    found: dict[str, Any] = {}
    for text in texts:
        key, mark, value = text.partition("=")
        if not mark or not key.rstrip(":"):
            raise click.UsageError(f"{option}: expected KEY=VALUE, got {text!r}")
        if key.endswith(":"):
            try:
                found[key[:-1]] = json.loads(value)
            except ValueError as error:
                why = f"{option}: {key[:-1]}: expected JSON after :=, got {value!r} ({error})"
                raise click.UsageError(why) from None
        else:
            found[key] = value
    return found


def _use_file(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Have apps find the file, here and in children."""
    if path is not None:
        os.environ["KQ_CONFIG"] = os.path.abspath(path)


def find_app(app_path: str | None, broker: str | None) -> App:
    """Return an app as `load` does, and warn of variables that nothing reads, and files that others may change.

    Raises as `load` does.
    """
    from kq.config import unknown_variables

    app = load(app_path, broker)
    for warning in (*unknown_variables(named=app.registry.variables), *app.registry.risks):
        warn(warning)
    return app


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.secho(f"warning: {text}", fg="yellow", err=True)


def load(app_path: str | None, broker: str | None) -> App:
    """Return the app that the options name, else the one that the configuration file describes.

    Raises:
        ConfigurationError: If it does not load, or its settings are wrong.
    """
    from kq.app import App
    from kq.config import unknown_is_shown

    unknown_is_shown()
    try:
        if app_path is None:
            app = App.from_file()
        else:
            from kq.target import load_app

            app = load_app(app_path)
        if broker is not None:
            app.registry.override(broker=broker)
        acting: Acting | None = click.get_current_context().obj
        if acting is not None and acting.actor is not None:
            _serve_as(app, acting)
            click.get_current_context().with_resource(app.registry.guard.acting(acting.actor, acting.groups))
        app.declarations.check_drivers()
        return app
    except errors.Error as error:
        raise ConfigurationError(error.message) from error


def _serve_as(app: App, acting: Acting) -> None:
    """Have workers of the app consume, and handlers run, as whoever gives the command, meta included.

    The environment names an actor for apps that name none; only the command line wins over code.
    """
    from kq.security.value import mutable

    assert acting.actor is not None
    if _is_given("actor") or (acting.actor.meta and app.registry.settings.actor == acting.actor.id):
        # Another one is not in the groups of the app's own.
        groups = {"groups": acting.groups} if _is_given("actor") or _is_given("groups") else {}
        app.registry.override(actor=acting.actor.id, actor_meta=mutable(acting.actor.meta), **groups)


def end(error: errors.Error) -> NoReturn:
    """Print an error and exit with the code that fits it."""
    fail(error.message, exit_code(error))


def exit_code(error: errors.Error) -> int:
    """Return the exit code of an error."""
    if isinstance(error, errors.PermissionDenied):
        return REFUSED
    if isinstance(error, errors.Conflict):
        return CONFIGURATION
    if isinstance(error, errors.Invalid):
        return USAGE
    return {"unavailable": UNREACHABLE, "timeout": UNREACHABLE, "refused": REFUSED}.get(
        str(error.details.get("reason")), FAILED
    )


def fail(text: str, code: int) -> NoReturn:
    """Print a line on stderr and exit."""
    click.echo(f"kq: {text}", err=True)
    sys.exit(code)


def confirm(question: str, yes: bool) -> None:
    """Ask on a terminal; elsewhere insist on ``--yes``."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("this destroys messages: give --yes where nobody can be asked")
    click.confirm(question, abort=True)


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]], most: int = 70) -> None:
    """Print a table: text to the left, numbers to the right, nothing as a dash.

    Args:
        titles: Of the columns.
        rows: A cell for each column.
        most: Characters of a cell that are shown.
    """
    cells = [["-" if cell is None else _shorten(str(cell), most) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(titles), *cells]) for i in range(len(titles))]
    numeric = [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(titles))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in pairs).rstrip()

    click.echo(line([title.upper() for title in titles]))
    for row in cells:
        click.echo(line(row))


def printable(text: str) -> str:
    """Return a line without control characters: they would be the terminal's to obey, and strangers write them."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _shorten(text: str, most: int) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 3] + "..."
