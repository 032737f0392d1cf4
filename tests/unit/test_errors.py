from __future__ import annotations

import pickle

import pytest

from kq import errors

CLASSES = {
    errors.INVALID: errors.Invalid,
    errors.NOT_FOUND: errors.NotFound,
    errors.ALREADY_EXISTS: errors.AlreadyExists,
    errors.CONFLICT: errors.Conflict,
    errors.PERMISSION_DENIED: errors.PermissionDenied,
    errors.CANCELED: errors.Canceled,
    errors.UNKNOWN: errors.Unknown,
    errors.INTERNAL: errors.Internal,
    errors.UNAVAILABLE: errors.Unavailable,
    errors.TIMEOUT: errors.Timeout,
    errors.RATE_LIMITED: errors.RateLimited,
}
RETRYABLE = {"INTERNAL", "UNAVAILABLE", "TIMEOUT", "RATE_LIMITED"}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_has_a_class_and_a_default(kind: str) -> None:
    """Each kind has one subclass, which brings the kind and whether a retry can help."""
    error = CLASSES[kind]("no")
    assert isinstance(error, errors.Error)
    assert error.kind == kind
    assert error.retryable is (kind in RETRYABLE)


def test_kinds_are_complete() -> None:
    """There are eleven kinds, and each is a constant whose value is its own name."""
    assert set(errors.RETRYABLE) == set(CLASSES)
    assert all(getattr(errors, kind) == kind for kind in CLASSES)


def test_plain_error_is_unknown() -> None:
    """An error of no kind is UNKNOWN, not retryable, and has no details."""
    error = errors.Error("what")
    assert (error.kind, error.retryable, error.details) == ("UNKNOWN", False, {})


@pytest.mark.parametrize("kind", CLASSES)
def test_error_takes_the_default_of_the_kind_it_is_given(kind: str) -> None:
    """``Error(kind=...)`` is retryable exactly where the kind is."""
    assert errors.Error("what", kind=kind).retryable is (kind in RETRYABLE)


@pytest.mark.parametrize(("cls", "retryable"), [(errors.Invalid, True), (errors.Internal, False)])
def test_retryable_wins_over_the_kind(cls: type[errors.Error], retryable: bool) -> None:
    """What the caller says of retrying wins over the kind's default."""
    assert cls("what", retryable=retryable).retryable is retryable


def test_str_is_the_message() -> None:
    """``str(error)`` is the message and nothing else."""
    error = errors.Invalid("expected a, got b", details={"reason": "x"})
    assert str(error) == error.message == "expected a, got b"


def test_message_is_text_whatever_was_given() -> None:
    """An exception passed as the message becomes its text."""
    error = errors.Internal(KeyError("id"))  # type: ignore[arg-type]
    assert error.message == str(error) == "'id'"


def test_repr_names_class_kind_and_retryable() -> None:
    """The repr says what one needs in a log."""
    assert repr(errors.NotFound("gone")) == "NotFound('gone', kind='NOT_FOUND', retryable=False)"


def test_details_are_a_copy() -> None:
    """Details are a plain dict of the error's own."""
    given = {"reason": "full"}
    error = errors.Internal("no", details=given)
    given["reason"] = "changed"
    assert error.details == {"reason": "full"}
    assert type(error.details) is dict


def test_unknown_kind_is_refused() -> None:
    """A kind that does not exist is refused with the list of those that do."""
    with pytest.raises(ValueError, match=r"one of INVALID, .*; got 'OOPS'"):
        errors.Error("what", kind="OOPS")


@pytest.mark.parametrize("cls", CLASSES.values())
def test_pickling_keeps_everything(cls: type[errors.Error]) -> None:
    """An error crosses a process boundary whole."""
    error = cls("what", retryable=True, details={"reason": "full"})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (copy.message, copy.kind, copy.retryable, copy.details) == (
        error.message,
        error.kind,
        True,
        {"reason": "full"},
    )
