from __future__ import annotations

import io
from typing import Any

import click
import pytest

from kq import errors
from kq.cli.option import DURATION, ConfigurationError, confirm, end, exit_code, table


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("5s", 5.0), ("250ms", 0.25), ("10m", 600.0), ("2h", 7200.0), ("1d", 86400.0), ("1.5h", 5400.0),
     (" 3s ", 3.0), ("0", 0.0), ("007", 7.0), (5, 5.0), (0.5, 0.5)],
)  # fmt: skip
def test_durations(text: Any, seconds: float) -> None:
    """A number is seconds; ms, s, m, h and d are the units."""
    found = DURATION.convert(text, None, None)
    assert found == pytest.approx(seconds)
    assert type(found) is float


@pytest.mark.parametrize(
    "text", ["", "s", "-5", "+5", "5 s", "5S", "5w", "1h30m", "1e3", ".5", "5.", "nan", "inf", "٣", "9" * 400]
)
def test_what_is_no_duration(text: str) -> None:
    """Anything else is a usage error with examples and what was got."""
    with pytest.raises(
        click.BadParameter, match="expected a duration such as 5, 5s, 250ms, 10m, 2h or 1d; got"
    ) as caught:
        DURATION.convert(text, None, None)
    assert repr(text) in caught.value.message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.Invalid("x"), 2),
        (errors.Conflict("x"), 78),
        (errors.PermissionDenied("x"), 77),
        (errors.Internal("x", details={"reason": "unavailable"}), 69),
        (errors.Internal("x", details={"reason": "timeout"}), 69),
        (errors.Internal("x", details={"reason": "refused"}), 77),
        (errors.Internal("x", details={"reason": "full"}), 1),
        (errors.Internal("x", details={"reason": ["odd"]}), 1),
        (errors.Internal("x"), 1),
        (errors.NotFound("x"), 1),
        (errors.Error("x"), 1),
    ],
)
def test_exit_codes(error: errors.Error, code: int) -> None:
    """2 usage, 69 broker unreachable, 77 refused, 78 configuration, 1 everything else."""
    assert exit_code(error) == code


def test_configuration_errors_exit_with_78() -> None:
    """An app that does not load is a matter of configuration."""
    assert ConfigurationError("x").exit_code == 78


def test_end_says_what_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    """An error is one line on stderr and its code."""
    with pytest.raises(SystemExit) as caught:
        end(errors.Invalid("expected a, got b"))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "kq: expected a, got b\n")


def test_confirm_needs_yes_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody can be asked, what destroys needs ``--yes``."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    confirm("really?", True)
    with pytest.raises(click.UsageError, match="--yes"):
        confirm("really?", False)


def test_table_aligns(capsys: pytest.CaptureFixture[str]) -> None:
    """Text stands to the left, numbers to the right, and nothing is a dash."""
    table(["queue", "ready", "age"], [["app:emails", 5, None], ["app:a", 1200, 1.5], [None, None, None]])
    assert capsys.readouterr().out.splitlines() == [
        "QUEUE       READY  AGE",
        "app:emails      5    -",
        "app:a        1200  1.5",
        "-               -    -",
    ]


def test_an_empty_table_has_titles(capsys: pytest.CaptureFixture[str]) -> None:
    """Without rows only the titles are printed."""
    table(["id", "reason"], [])
    assert capsys.readouterr().out.splitlines() == ["ID  REASON"]


def test_cells_are_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks become spaces, and long text is cut."""
    table(["error"], [["a\n  b\tc"], ["x" * 71], ["y" * 70]])
    assert capsys.readouterr().out.splitlines() == ["ERROR", "a b c", "x" * 67 + "...", "y" * 70]


def test_cells_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters and lone surrogates that a stranger sent are not passed on."""
    table(["error"], [["a\x1b[31mb\x07"], ["\udc80 \u202e é"]])
    assert capsys.readouterr().out.splitlines() == ["ERROR", "a?[31mb?", "? ? é"]
