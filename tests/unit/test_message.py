from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest

import kq
from kq import errors, queue
from kq.envelope import Envelope
from kq.message import Message, Settled, current, enter

HEADERS: dict[str, Any] = {"priority": "high", "correlation_id": "r-17", "x_kq": 1, "x_attempts": 99, "x_crashes": 98}
Settlements = list[tuple[Settled, float | None]]


def make(settled: bool = False, headers: dict[str, Any] = HEADERS) -> tuple[Message, Settlements]:
    """A message, and the list that its settlements go to."""
    seen: Settlements = []
    envelope = Envelope("m-1", dict(headers), {}, b"1")
    message = Message(
        envelope,
        queue="app:a",
        attempt=2,
        crashes=1,
        on_settle=lambda how, delay: seen.append((how, delay)),
        settled=settled,
    )
    return message, seen


def test_what_a_handler_sees() -> None:
    """Id, queue, attempt and headers are the delivery's."""
    message, _ = make()
    assert (message.id(), message.queue_id(), message.attempt()) == ("m-1", "app:a", 2)
    assert message.header("priority") == "high"
    assert message.header("missing") is None
    assert message.headers() == {"priority": "high", "correlation_id": "r-17"}


def test_an_app_has_the_message_as_well() -> None:
    """Where there are several, its own methods are what to use."""
    seen = []
    with kq.App("app", broker="memory://has-the-message") as app:
        app.consumer("app:a")(lambda payload: seen.append(app.message() is queue.message()))
        app.publish("app:a", 1)
        assert app.drain() == 1
        with pytest.raises(errors.Invalid, match="no delivery in context"):
            app.message()
    assert seen == [True]


def test_a_version_is_a_number() -> None:
    """What a stranger has written in its place is not shown as one."""
    for given, shown in ((1, 1), ("evil", None), (True, None), (None, None)):
        headers: dict[str, Any] = {} if given is None else {"x_kq": given}
        message, _ = make(headers=headers)
        assert message.headers(reserved=True).get("x_kq") == shown


def test_reserved_headers_on_request() -> None:
    """With ``reserved=True`` kq's own are there, and the counts are the delivery's, not a publisher's claim."""
    message, _ = make()
    reserved = message.headers(reserved=True)
    assert (reserved["x_kq"], reserved["x_attempts"], reserved["x_crashes"]) == (1, 2, 1)
    assert (message.header("x_attempts"), message.header("x_crashes"), message.header("x_none")) == (2, 1, None)


@pytest.mark.parametrize("reserved", [False, True])
def test_headers_are_a_copy(reserved: bool) -> None:
    """Changing what was returned changes nothing."""
    message, _ = make()
    message.headers(reserved=reserved)["priority"] = "changed"
    assert message.header("priority") == "high"


def test_ack_settles() -> None:
    """An ack is reported at once, without a delay."""
    message, seen = make()
    message.ack()
    assert seen == [(Settled.ACK, None)]


@pytest.mark.parametrize(("delay", "expected"), [(None, None), (0, 0.0), (5, 5.0), (timedelta(minutes=1), 60.0)])
def test_nack_settles(delay: Any, expected: float | None) -> None:
    """A nack is reported at once, with its delay in seconds."""
    message, seen = make()
    message.nack(delay)
    assert seen == [(Settled.NACK, expected)]


@pytest.mark.parametrize("delay", [-1, "5", float("nan"), 366 * 86400])
def test_bad_nack_settles_nothing(delay: Any) -> None:
    """A nack with a delay that is none is Invalid, and the message can still be settled."""
    message, seen = make()
    with pytest.raises(errors.Invalid, match="delay: expected"):
        message.nack(delay)
    message.ack()
    assert seen == [(Settled.ACK, None)]


@pytest.mark.parametrize("first", [Message.ack, Message.nack, Message.claim])
@pytest.mark.parametrize("second", [Message.ack, Message.nack])
def test_settlement_is_single_shot(first: Callable[[Message], Any], second: Callable[[Message], Any]) -> None:
    """The first of ack, nack and the automatic settlement wins; a later call is Invalid."""
    message, seen = make()
    first(message)
    before = list(seen)
    with pytest.raises(errors.Invalid, match="already settled; expected one ack or nack"):
        second(message)
    assert message.claim() is False
    assert seen == before


def test_a_message_can_be_settled_from_the_start() -> None:
    """Where messages are settled before the handler runs, an ack is one too many."""
    message, seen = make(settled=True)
    with pytest.raises(errors.Invalid, match="already settled"):
        message.ack()
    assert message.claim() is False
    assert seen == []


@pytest.mark.parametrize(
    "use",
    [
        Message.id, Message.queue_id, Message.attempt, Message.headers, Message.ack, Message.nack,
        lambda message: message.header("priority"), lambda message: message.header("x_attempts"),
        lambda message: message.headers(reserved=True), lambda message: message.nack(5),
    ],
)  # fmt: skip
def test_after_release_everything_is_invalid(use: Callable[[Message], Any]) -> None:
    """Once the handler has returned, every method raises Invalid."""
    message, seen = make()
    message.release()
    with pytest.raises(errors.Invalid, match="message released"):
        use(message)
    assert seen == []
    assert message.claim() is True


def test_one_of_many_threads_settles() -> None:
    """Of threads that settle at the same moment exactly one succeeds."""
    message, seen = make()
    barrier = Barrier(8)

    def settle(number: int) -> bool:
        barrier.wait()
        try:
            message.ack() if number % 2 else message.nack()
        except errors.Invalid:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(settle, range(8))) == len(seen) == 1


def test_no_message_outside_of_a_handler() -> None:
    """Where no delivery is in context, asking for it is Invalid."""
    with pytest.raises(errors.Invalid, match="no delivery in context"):
        contextvars.Context().run(queue.message)


def test_current_message_follows_the_context() -> None:
    """What is entered is found, also in a thread with a copied context, and nowhere else."""
    message, _ = make()

    def look() -> None:
        enter(message)
        assert queue.message() is current() is message
        context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(context.run, queue.message).result() is message
            with pytest.raises(errors.Invalid):
                threads.submit(contextvars.Context().run, queue.message).result()

    contextvars.copy_context().run(look)
    with pytest.raises(errors.Invalid):
        queue.message()


def test_repr_says_how_it_stands() -> None:
    """The repr names id, queue, attempt and state, and works after the release."""
    message, _ = make()
    assert repr(message) == "<Message m-1 of app:a, attempt 2, live>"
    message.ack()
    assert repr(message).endswith("settled>")
    message.release()
    assert repr(message).endswith("released>")
