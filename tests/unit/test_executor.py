from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from time import time
from typing import Any

import msgspec
import pytest

import kq
from kq import errors, queue
from kq.backend import QueueSpec
from kq.envelope import Envelope, pack
from kq.executor import Executor, HandleMiddleware, Job, Run, describe, timeout_outcome
from kq.message import Message
from kq.outcome import DONE, Failure, Outcome
from kq.retry import Backoff, RetryPolicy
from kq.router import Consumer, Router
from kq.shield import HandlerTimeout
from kq.worker import frame

POLICY = RetryPolicy(max_attempts=3, backoff=Backoff(initial=2.0, jitter="none"))
SPEC = QueueSpec("app:a", policy=POLICY)
Emitted = list[tuple[Job, Outcome]]


class Faulty(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def make(
    handler: Callable[[Any], Any] = lambda payload: None,
    *,
    middleware: Sequence[HandleMiddleware] = (),
    activate: Callable[[], AbstractContextManager[Any]] = nullcontext,
    spec: QueueSpec = SPEC,
    **rules: Any,
) -> Executor:
    """An executor of one consumer of ``app:a``."""
    router = Router()
    router.add(Consumer("app:a", "handle", handler, **rules))
    return Executor(router, lambda id: spec, max_body=100, middleware=middleware, activate=activate)


def job(
    body: bytes = b'{"n": 1}', *, attempts: int = 0, crashes: int = 0, settled: bool = False, queue: str = "app:a",
    headers: dict[str, Any] | None = None, **properties: Any,
) -> Job:  # fmt: skip
    """A delivery of a message with this body."""
    raw = pack(Envelope("m-1", headers or {}, properties, body))
    return Job(1, queue, "m-1", raw, attempts, crashes, settled)


def prepare(executor: Executor, what: Job, emitted: Emitted | None = None) -> Run:
    """A run of a job that must pass every check."""
    run = executor.prepare(what, lambda job, outcome: None if emitted is None else emitted.append((job, outcome)))
    assert isinstance(run, Run)
    return run


def refused(executor: Executor, what: Job) -> tuple[str, str]:
    """The reason and the error of a job that must not run."""
    outcome = executor.prepare(what, lambda job, outcome: None)
    assert isinstance(outcome, Outcome)
    assert outcome.action == "dead"
    assert outcome.failure is not None
    assert not outcome.failure.retryable
    return outcome.reason, outcome.failure.message


def handle(
    handler: Callable[[Any], Any], *, emitted: Emitted | None = None, attempts: int = 0, **rules: Any
) -> Outcome | None:
    """What comes of one delivery to a sync handler."""
    executor = make(handler, **rules)
    run = prepare(executor, job(attempts=attempts), emitted)
    outcome = executor.run(run)
    return outcome if run.message.claim() else None


def handle_async(handler: Callable[[Any], Any], *, emitted: Emitted | None = None, **rules: Any) -> Outcome | None:
    """What comes of one delivery to an async handler."""
    executor = make(handler, **rules)
    run = prepare(executor, job(), emitted)
    outcome = asyncio.run(executor.run_async(run))
    return outcome if run.message.claim() else None


def raising(error: BaseException) -> Callable[[Any], Any]:
    """A handler that raises."""

    def handler(payload: Any) -> None:
        raise error

    return handler


def failure_of(outcome: Outcome | None) -> Failure:
    """The failure of an outcome that has one."""
    assert outcome is not None
    assert outcome.failure is not None
    return outcome.failure


# Which consumer runs it.


async def _later(payload: Any) -> None: ...


@pytest.mark.parametrize(
    ("index", "expected", "is_async"), [(0, "first", False), (1, "second", True), (2, "first", False)]
)
def test_a_job_runs_on_the_consumer_it_was_given_to(index: int, expected: str, is_async: bool) -> None:
    """The number in a job chooses among the queue's consumers, and one beyond them chooses one all the same."""
    router = Router()
    router.add(Consumer("app:a", "first", lambda payload: None, max_attempts=1))
    router.add(Consumer("app:a", "second", _later, max_attempts=2))
    executor = Executor(router, lambda id: SPEC, max_body=100, activate=nullcontext)
    what = job()
    what.consumer = index
    run = prepare(executor, what)
    assert run.consumer.name == expected
    assert run.policy.max_attempts == (2 if is_async else 1)
    assert executor.is_async(what) is is_async


def test_each_consumer_of_a_queue_has_its_own_handler() -> None:
    """What is kept of one consumer's handler is not used for another's."""
    ran: list[str] = []

    def noting(name: str) -> Callable[[Any], None]:
        return lambda payload: ran.append(name)

    router = Router()
    for name in ("first", "second"):
        router.add(Consumer("app:a", name, noting(name)))
    executor = Executor(router, lambda id: SPEC, max_body=100, activate=nullcontext)
    for index in (0, 1, 0):
        what = job()
        what.consumer = index
        assert executor.run(prepare(executor, what)) == DONE
    assert ran == ["first", "second", "first"]


def test_a_job_without_a_consumer_is_not_async() -> None:
    """A job of a queue that nobody consumes here can be asked about, and is refused later."""
    assert not make().is_async(job(queue="app:z"))


# What must not run.


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"stranger", msgspec.msgpack.encode([1, 2])])
def test_no_envelope_is_undecodable(raw: bytes) -> None:
    """Bytes that are no envelope never reach a handler."""
    reason, error = refused(make(), Job(1, "app:a", "m-1", raw))
    assert reason == "undecodable"
    assert error.startswith("not an envelope: ")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (job(b"{"), "the body is not JSON"),
        (job(b"x" * 101), "the body has 101 bytes, the limit is 100"),
        (
            job(b"1", content_type="application/x-python-serialize"),
            "content type 'application/x-python-serialize' is not",
        ),
        (
            job(b"1", content_type="application/json", content_encoding="gzip"),
            "content encoding 'gzip' is not accepted",
        ),
        (job(b"[NaN]"), "the body is not JSON"),
    ],
)
def test_undecodable_bodies(what: Job, expected: str) -> None:
    """A body that is too large, of a foreign type or broken is undecodable, and the error says which."""
    reason, error = refused(make(), what)
    assert reason == "undecodable"
    assert expected in error


def test_size_is_checked_before_the_content_type() -> None:
    """The first check that fails names the error, and size comes first."""
    assert "101 bytes" in refused(make(), job(b"x" * 101, content_type="text/evil"))[1]


def test_a_body_of_exactly_the_limit_runs() -> None:
    """The limit itself is allowed."""
    assert prepare(make(), job(b'"' + b"x" * 98 + b'"')).payload == "x" * 98


def test_undecodable_charges_nothing() -> None:
    """A message that never ran keeps its counts."""
    outcome = make().prepare(job(b"{", attempts=2, crashes=1), lambda job, outcome: None)
    assert isinstance(outcome, Outcome)
    assert (outcome.attempts, outcome.crashes) == (2, 1)


def test_no_handler() -> None:
    """A queue without a consumer is told by name."""
    reason, error = refused(make(), job(queue="app:other"))
    assert reason == "no_handler"
    assert "app:other" in error


@pytest.mark.parametrize("task", ["shop.build", "", 5])
def test_unregistered_task_has_no_handler(task: Any) -> None:
    """A ``task`` header that names no task is no_handler, though the queue has a plain consumer."""
    reason, error = refused(make(), job(headers={"task": task}))
    assert reason == "no_handler"
    assert repr(task) in error


@pytest.mark.parametrize("at", [0, 1.5, -5, "now"])
def test_expired_messages_do_not_run(at: Any) -> None:
    """A message past its expiry is dead, also where nobody could decode it."""
    at = time() if at == "now" else at
    assert refused(make(), job(b"{", headers={"x_expires_at": at}))[0] == "expired"


@pytest.mark.parametrize("at", ["in an hour", float("nan"), float("inf"), "0", None, True, [0]])
def test_messages_that_are_not_expired_run(at: Any) -> None:
    """An expiry ahead, or one that is no time, expires nothing."""
    at = time() + 3600 if at == "in an hour" else at
    assert prepare(make(), job(headers={"x_expires_at": at})).payload == {"n": 1}


# What runs.


def test_foreign_messages_are_served() -> None:
    """Without kq's header, content type and encoding the queue's codec decides."""
    msgpack = QueueSpec("app:a", codec="application/msgpack")
    assert prepare(make(), job(b"[1]")).payload == [1]
    assert prepare(make(spec=msgpack), job(b"\x91\x01")).payload == [1]
    assert prepare(make(spec=msgpack), job(b"[1]", content_type="application/json")).payload == [1]


@pytest.mark.parametrize("name", ["content_type", "content_encoding"])
def test_a_content_type_that_is_no_text_is_undecodable(name: str) -> None:
    """A content type or encoding that is no text is refused, and shown."""
    raw = pack(Envelope("m-1", {}, {name: 5}, b"1"))
    reason, why = refused(make(), Job(1, "app:a", "m-1", raw))
    assert reason == "undecodable"
    assert "is 5; expected text" in why


def test_a_coroutine_from_a_plain_function_is_not_done() -> None:
    """A plain function that returns a coroutine has not run: the message is a dead letter, not done."""

    async def inner(payload: Any) -> None: ...

    target = make(lambda payload: inner(payload))  # noqa: PLW0108 - the plain function is the point
    outcome = target.run(prepare(target, job()))
    assert outcome is not None
    assert (outcome.action, outcome.reason) == ("dead", "not_retryable")
    assert outcome.failure is not None
    assert "did not run" in outcome.failure.message


def test_a_generator_from_a_plain_function_is_not_done() -> None:
    """A plain function that returns a generator has not run either."""

    def inner(payload: Any) -> Iterator[None]:
        yield

    async def ainner(payload: Any) -> AsyncIterator[None]:
        yield

    for generate in (lambda payload: inner(payload), lambda payload: ainner(payload)):  # noqa: PLW0108 - the point
        target = make(generate)
        outcome = target.run(prepare(target, job()))
        assert (outcome.action, outcome.reason) == ("dead", "not_retryable")
        assert outcome.failure is not None
        assert "returned a generator; it did not run" in outcome.failure.message


def test_the_handler_gets_payload_and_message() -> None:
    """The payload is the argument, and the message is in context with this attempt counted."""
    seen: list[Any] = []

    def handler(payload: Any) -> None:
        message = queue.message()
        seen.extend([payload, message.id(), message.queue_id(), message.attempt(), message.header("a")])
        seen.append(message.headers(reserved=True))

    executor = make(handler)
    outcome = executor.run(prepare(executor, job(headers={"a": 1, "x_kq": 1}, attempts=1, crashes=1)))
    assert outcome is DONE
    assert seen == [{"n": 1}, "m-1", "app:a", 2, 1, {"a": 1, "x_kq": 1, "x_attempts": 2, "x_crashes": 1}]


@pytest.mark.parametrize("result", [None, True, 0, "", [], "False", object()])
def test_anything_but_false_is_done(result: Any) -> None:
    """Whatever a handler returns, unless it is False, the message is done."""
    assert handle(lambda payload: result) == DONE


def test_false_is_a_failed_attempt() -> None:
    """Returning False is a charged, retryable attempt of kind INTERNAL."""
    outcome = handle(lambda payload: False)
    assert outcome == Outcome("retry", 2.0, 1, 0, "", Failure("INTERNAL", "the handler returned False", True))


def test_any_exception_is_internal_and_retried() -> None:
    """An exception of the user's is wrapped as INTERNAL, with its name, text and traceback."""
    outcome = handle(raising(KeyError("id")))
    assert outcome is not None
    assert (outcome.action, outcome.delay, outcome.attempts) == ("retry", 2.0, 1)
    failure = failure_of(outcome)
    assert (failure.kind, failure.message, failure.retryable) == ("INTERNAL", "KeyError: 'id'", True)
    assert failure.traceback.endswith("KeyError: 'id'\n")
    assert failure.traceback.count("  File ") == 1, "frames of kq's own"
    assert __file__ in failure.traceback
    assert "test_executor.py" in failure.traceback


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Faulty(), RecursionError("deep")]
)
def test_nothing_a_handler_raises_escapes(error: BaseException) -> None:
    """Whatever a handler raises becomes a retry: a handler cannot end its worker that way."""
    outcome = handle(raising(error))
    assert outcome is not None
    assert outcome.action == "retry"
    assert failure_of(outcome).message.startswith(type(error).__name__)


def test_retryable_errors_are_retried_until_the_last_attempt() -> None:
    """A retryable error goes back until ``max_attempts`` attempts have run."""
    error = errors.Unavailable("away")
    found = [handle(raising(error), attempts=attempts) for attempts in range(3)]
    assert [(o.action, o.delay, o.attempts, o.reason) for o in found if o] == [
        ("retry", 2.0, 1, ""),
        ("retry", 4.0, 2, ""),
        ("dead", 0.0, 3, "max_attempts"),
    ]
    assert failure_of(found[2]).kind == "UNAVAILABLE"


def test_other_errors_are_dead_at_once() -> None:
    """An error that a retry cannot help is dead at its first attempt."""
    outcome = handle(raising(errors.Invalid("bad")))
    assert outcome is not None
    assert (outcome.action, outcome.reason, outcome.attempts) == ("dead", "not_retryable", 1)
    assert failure_of(outcome).message == "bad"


def test_the_consumer_wins_over_the_queue() -> None:
    """``max_attempts`` and ``retry`` of the consumer are the ones that count."""
    assert handle(lambda payload: False, max_attempts=1) == Outcome(
        "dead", 0.0, 1, 0, "max_attempts", Failure("INTERNAL", "the handler returned False", True)
    )
    outcome = handle(lambda payload: False, backoff=Backoff(initial=50, jitter="none"))
    assert outcome is not None
    assert outcome.delay == 50.0


@pytest.mark.parametrize(
    ("retry", "attempts", "expected"),
    [
        (kq.Retry(delay=7), 0, ("retry", 7.0, 1, "")),
        (kq.Retry(), 1, ("retry", 4.0, 2, "")),
        (kq.Retry(delay=7), 2, ("dead", 0.0, 3, "max_attempts")),
        (kq.Retry(delay=7, count=False), 0, ("retry", 7.0, 0, "")),
        (kq.Retry(delay=7, count=False), 2, ("retry", 7.0, 2, "")),
        (kq.Retry(count=False), 0, ("retry", 2.0, 0, "")),
    ],
)
def test_retry_asked_for(retry: kq.Retry, attempts: int, expected: tuple[str, float, int, str]) -> None:
    """``kq.Retry`` comes back after its delay, and is charged unless ``count=False``."""
    outcome = handle(raising(retry), attempts=attempts)
    assert outcome is not None
    assert (outcome.action, outcome.delay, outcome.attempts, outcome.reason) == expected


def test_a_delay_of_another_kind_of_number_is_a_number() -> None:
    """It is sent to the supervisor, which knows only plain ones."""

    class Seconds(float):
        pass

    class Later(kq.Retry):
        def __init__(self) -> None:
            self.delay = Seconds(2.0)

    outcome = handle(raising(Later()))
    assert outcome is not None
    assert (outcome.delay, type(outcome.delay)) == (2.0, float)


def test_a_coroutine_that_runs_elsewhere_is_not_done() -> None:
    """It cannot be closed; the handler has returned something to await all the same."""

    @types.coroutine
    def step() -> Generator[None, None, None]:
        try:
            yield
        except GeneratorExit:
            yield

    async def run() -> None:
        await step()

    coroutine = run()
    coroutine.send(None)

    def handler(payload: Any) -> Any:
        return coroutine

    outcome = handle(handler)
    assert outcome is not None
    assert outcome.action == "dead"


def test_what_cannot_be_looked_at_is_a_result() -> None:
    """The handler has returned; what its result is like is its own affair."""

    class Proxy:
        @property  # type: ignore[misc]
        def __class__(self) -> Any:
            raise LookupError("nothing behind it")

    assert handle(lambda payload: Proxy()) == DONE


def test_ack_from_the_handler_wins() -> None:
    """A handler that acks and then fails has acked."""
    emitted: Emitted = []

    def handler(payload: Any) -> None:
        queue.message().ack()
        raise RuntimeError("too late")

    assert handle(handler, emitted=emitted) is None
    assert [(job.tag, outcome) for job, outcome in emitted] == [(1, DONE)]


@pytest.mark.parametrize(("delay", "wait"), [(None, 2.0), (0, 0.0), (30, 30.0)])
def test_nack_is_a_failed_attempt(delay: float | None, wait: float) -> None:
    """A nack is charged and retried, after its own delay or the backoff."""
    emitted: Emitted = []
    assert handle(lambda payload: queue.message().nack(delay), emitted=emitted) is None
    ((_, outcome),) = emitted
    assert (outcome.action, outcome.delay, outcome.attempts) == ("retry", wait, 1)
    assert failure_of(outcome).kind == "INTERNAL"


def test_nack_of_the_last_attempt_is_dead() -> None:
    """A nack, with a delay or without, does not prolong a message's life."""
    emitted: Emitted = []
    assert handle(lambda payload: queue.message().nack(30), emitted=emitted, attempts=2) is None
    assert [(outcome.action, outcome.reason, outcome.attempts) for _, outcome in emitted] == [
        ("dead", "max_attempts", 3)
    ]


def test_settled_beforehand() -> None:
    """With ``auto_ack`` the handler's end settles nothing, and its ack is Invalid."""
    emitted: Emitted = []
    executor = make(lambda payload: queue.message().ack())
    run = prepare(executor, job(settled=True), emitted)
    executor.run(run)
    assert not run.message.claim()
    assert emitted == []


def test_after_the_handler_the_message_is_released() -> None:
    """A message that is kept beyond its handler is Invalid, and no message is in context."""
    kept: list[Message] = []
    handle(lambda payload: kept.append(queue.message()))
    with pytest.raises(errors.Invalid, match="message released"):
        kept[0].id()
    with pytest.raises(errors.Invalid, match="no delivery in context"):
        queue.message()


def test_what_a_handler_leaves_in_its_context_is_gone() -> None:
    """The next message in the same thread begins as this one did, with what the thread has."""
    tenant: ContextVar[str] = ContextVar("tenant", default="none")
    seen = []

    def handler(payload: Any) -> None:
        seen.append(tenant.get())
        tenant.set("mine")

    def serve() -> None:
        tenant.set("everybody's")
        assert [handle(handler) for _ in range(2)] == [DONE, DONE]

    copy_context().run(serve)
    assert seen == ["everybody's", "everybody's"]


def test_middleware_is_an_onion() -> None:
    """The first middleware is outermost, may change payload and result, and sees the message."""
    seen: list[Any] = []

    def outer(message: Message, payload: Any, call_next: Callable[[Any], Any]) -> Any:
        seen.append(("outer", message.id(), payload))
        result = call_next({"n": 2})
        seen.append(("outer got", result))
        return False

    def inner(message: Message, payload: Any, call_next: Callable[[Any], Any]) -> Any:
        seen.append(("inner", payload))
        return call_next(payload)

    outcome = handle(lambda payload: payload["n"], middleware=[outer, inner])
    assert seen == [("outer", "m-1", {"n": 1}), ("inner", {"n": 2}), ("outer got", 2)]
    assert failure_of(outcome).message == "the handler returned False"


def test_middleware_that_fails_is_a_failed_attempt() -> None:
    """An error of a middleware counts as the handler's."""

    def broken(message: Message, payload: Any, call_next: Callable[[Any], Any]) -> Any:
        raise errors.RateLimited("slow down")

    assert failure_of(handle(lambda payload: None, middleware=[broken])).kind == "RATE_LIMITED"


def test_the_app_is_active_while_the_handler_runs() -> None:
    """The app is the current one exactly while its handler runs, however that ends."""
    seen: list[str] = []

    @contextmanager
    def activate() -> Iterator[None]:
        seen.append("on")
        try:
            yield
        finally:
            seen.append("off")

    handle(lambda payload: seen.append("run"), activate=activate)
    handle(raising(ValueError()), activate=activate)
    assert seen == ["on", "run", "off", "on", "off"]


def test_async_handlers() -> None:
    """Async handlers have the same endings, and the message in context across awaits."""

    async def good(payload: Any) -> str:
        await asyncio.sleep(0)
        return queue.message().id()

    async def no(payload: Any) -> bool:
        return False

    async def bad(payload: Any) -> None:
        await asyncio.sleep(0)
        raise errors.Invalid("bad")

    async def again(payload: Any) -> None:
        raise kq.Retry(delay=7, count=False)

    assert handle_async(good) == DONE
    assert failure_of(handle_async(no)).message == "the handler returned False"
    assert failure_of(handle_async(bad)).message == "bad"
    assert handle_async(again) == Outcome(
        "retry", 7.0, 0, 0, failure=Failure("INTERNAL", "the handler asked for a retry", True)
    )


def test_async_ack_wins() -> None:
    """An async handler can settle its message itself."""
    emitted: Emitted = []

    async def handler(payload: Any) -> None:
        queue.message().ack()

    assert handle_async(handler, emitted=emitted) is None
    assert [outcome for _, outcome in emitted] == [DONE]


def test_async_cancellation_is_the_runners() -> None:
    """A cancelled run raises, and `canceled` says what comes of it: a charged retry of kind CANCELED."""

    async def handler(payload: Any) -> None:
        raise asyncio.CancelledError

    executor = make(handler)
    run = prepare(executor, job())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(executor.run_async(run))
    outcome = executor.canceled(run)
    assert outcome is not None
    assert (outcome.action, outcome.attempts, failure_of(outcome).kind) == ("retry", 1, "CANCELED")


def test_timeout_is_raised_through_and_charged() -> None:
    """A run stopped at its limit raises, releases its message, and is a retryable TIMEOUT."""
    executor = make(raising(HandlerTimeout()), timeout=0.5)
    run = prepare(executor, job())
    with pytest.raises(HandlerTimeout):
        executor.run(run)
    with pytest.raises(errors.Invalid, match="message released"):
        run.message.id()
    outcome = executor.timed_out(run)
    failure = failure_of(outcome)
    assert outcome == Outcome("retry", 2.0, 1, 0, "", failure)
    assert (failure.kind, failure.retryable) == ("TIMEOUT", True)
    assert failure.message == "handler handle ran past its timeout of 0.5 s"
    assert "HandlerTimeout" in failure.traceback


def test_timeout_of_a_killed_process_is_no_crash() -> None:
    """Where the process had to be killed the attempt is charged and the crash is not."""
    consumer = Consumer("app:a", "handle", print, timeout=3.0)
    outcome = timeout_outcome(consumer, POLICY, attempts=2, crashes=1)
    assert (outcome.action, outcome.reason, outcome.attempts, outcome.crashes) == ("dead", "max_attempts", 3, 1)


class Forgetful(errors.Error):
    """An error whose author forgot to call ours."""

    def __init__(self) -> None:
        pass


class Careless(kq.Retry):
    """A retry whose author forgot to call ours."""

    def __init__(self) -> None:
        pass


def odd(**attributes: Any) -> errors.Internal:
    """An error with attributes that are not what they must be."""
    error = errors.Internal("odd")
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    "error",
    [Forgetful(), Careless(), odd(kind=5), odd(kind=[]), odd(retryable=None), odd(message=None), odd(message=b"x")],
)
def test_odd_exceptions_are_outcomes_too(error: BaseException) -> None:
    """Whatever an exception is like, there is an outcome, and it can be sent to another process."""
    outcome = handle(raising(error))
    assert outcome is not None
    assert outcome.action in ("retry", "dead")
    raw = frame.encode(frame.Results([], [(1, outcome)]))
    assert isinstance(frame.in_supervisor().feed(raw)[0], frame.Results)


def test_long_errors_are_clipped() -> None:
    """A dead letter keeps 1 KiB of the message and the last 4 KiB of the traceback."""
    for error in (ValueError("é" * 10_000), errors.Internal("é" * 10_000)):
        failure = describe(error)
        assert len(failure.message.encode()) <= 1024
        assert len(failure.traceback.encode()) <= 4096
        assert failure.traceback.endswith("é\n")


@pytest.mark.parametrize("error", [errors.Internal(KeyError("id")), errors.Internal(5)])  # type: ignore[arg-type]
def test_errors_with_odd_messages_are_described(error: errors.Error) -> None:
    """A message that is no text becomes text."""
    assert describe(error).message in ("'id'", "5")
