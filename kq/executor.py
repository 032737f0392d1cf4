"""One delivery becomes one outcome: unpack, check, route, decode, run.

A delivery walks through named steps; the first that cannot go on names the outcome. Nothing here
settles anything: the outcome is a value, and the supervisor carries it out.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from typing import Any

import msgspec

from kq import errors, limit
from kq.admission import Admission, Distrust, Refused
from kq.backend import QueueSpec
from kq.envelope import unpack
from kq.failure_log import logger
from kq.handler import HERE
from kq.message import Message, Settled, enter
from kq.outcome import (
    DONE,
    MAX_MESSAGE,
    MAX_TRACEBACK,
    Failure,
    Outcome,
    clip,
)
from kq.retry import Retry, RetryPolicy, after_failure
from kq.router import Consumer, Router
from kq.shield import HandlerTimeout

#: Middleware around handling. For an async handler ``call_next`` returns an awaitable.
HandleMiddleware = Callable[[Message, Any, Callable[[Any], Any]], Any]


class Job(msgspec.Struct, array_like=True):
    """A delivery on its way to the process that runs it.

    Attributes:
        tag: The supervisor's number for it.
        queue: The queue id.
        id: The message's id.
        raw: The packed envelope.
        attempts: Charged before this run.
        crashes: Charged before this run.
        settled: Whether it was acknowledged beforehand (``auto_ack``).
        consumer: Which of the queue's consumers runs it, by the order of their declaration.
        replayed: Whether a message of this id has been completed before.
    """

    tag: int
    queue: str
    id: str
    raw: bytes
    attempts: int = 0
    crashes: int = 0
    settled: bool = False
    consumer: int = 0
    replayed: bool = False


class Run:
    """A job that passed every check and is ready to run."""

    __slots__ = ("consumer", "job", "message", "out_of_memory", "payload", "policy", "trace")

    def __init__(self, job: Job, consumer: Consumer, policy: RetryPolicy, message: Message, payload: Any) -> None:
        self.job = job
        self.consumer = consumer
        self.policy = policy
        self.message = message
        self.payload = payload
        #: Whether the handler ran out of memory: what it has left behind is in doubt.
        self.out_of_memory = False
        #: Where the handler was when it was stopped.
        self.trace = ""


class Executor:
    """Turns jobs into outcomes. Thread-safe.

    Args:
        router: Who handles what.
        specs: Returns a queue as declared.
        max_body: Bytes of the largest body it will parse.
        distrust: Who says whether messages of queues that ask for signatures can be trusted.
        middleware: Around every handler, outermost first.
        activate: Makes the app the current one while a handler runs.
    """

    def __init__(
        self,
        router: Router,
        specs: Callable[[str], QueueSpec],
        *,
        max_body: int,
        distrust: Distrust | None = None,
        middleware: Sequence[HandleMiddleware] = (),
        activate: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._router = router
        self._specs = specs
        self._admission = Admission(max_body, distrust, router)
        self._activate = activate
        self._middleware = tuple(middleware)
        #: By queue and by the consumer's name.
        self._calls: dict[tuple[str, str], Callable[[Message, Any], Any]] = {}
        self._are_async: dict[str, tuple[bool, ...]] = {}

    def is_async(self, job: Job) -> bool:
        """Tell whether the handler of a job is async."""
        kinds = self._are_async.get(job.queue)
        if kinds is None:
            kinds = tuple(consumer.is_async for consumer in self._router.of(job.queue)) or (False,)
            self._are_async[job.queue] = kinds
        return kinds[job.consumer % len(kinds)]

    def prepare(self, job: Job, emit: Callable[[Job, Outcome], None]) -> Run | Outcome:
        """Return the run for a job, or its outcome if it must not run.

        Args:
            job: The delivery.
            emit: Called, from any thread, if the handler settles the message itself.
        """
        spec = self._specs(job.queue)
        try:
            # What is acknowledged was admitted before that, and is not to be too old by now.
            envelope = unpack(job.raw) if job.settled else self._admission.open(spec, job.raw, job.replayed)
            consumer = self._admission.route(job.queue, envelope, job.consumer)
            payload = self._admission.decode(spec, envelope)
        except Refused as refused:
            return refused.outcome(job.attempts, job.crashes)
        policy = consumer.policy(spec.policy)

        def on_settle(how: Settled, delay: float | None) -> None:
            if how is Settled.ACK:
                emit(job, DONE)
            else:
                failure = Failure(errors.INTERNAL, "the handler called nack()", True)
                emit(job, after_failure(failure, policy, attempts=job.attempts + 1, crashes=job.crashes, delay=delay))

        message = Message(
            envelope,
            queue=job.queue,
            attempt=job.attempts + 1,
            crashes=job.crashes,
            on_settle=on_settle,
            settled=job.settled,
        )
        return Run(job, consumer, policy, message, payload)

    def run(self, run: Run) -> Outcome:
        """Run a sync handler and return the outcome; it counts only if the message lets itself be claimed.

        In a context of its own: what it leaves in context variables, the next one in this thread does not find.

        Raises:
            HandlerTimeout: If it was raised in this thread; see `timed_out`.
        """
        return copy_context().run(self._run, run)

    def _run(self, run: Run) -> Outcome:
        enter(run.message)
        try:
            with self._activate():
                result = self._call(run.consumer)(run.message, run.payload)
        except HandlerTimeout as late:
            run.trace = _trace(late)
            raise
        except BaseException as error:
            outcome = _failed(run, error)
        else:
            outcome = _returned(run, result)
        finally:
            run.message.release()
        return outcome

    async def run_async(self, run: Run) -> Outcome:
        """Run an async handler in its own task; otherwise as `run`."""
        # Imported here: a process that has no async handlers does without the largest of all modules.
        from asyncio import CancelledError

        enter(run.message)
        try:
            with self._activate():
                result: Awaitable[Any] = self._call(run.consumer)(run.message, run.payload)
                value = await result
        except CancelledError as late:
            run.trace = _trace(late)
            raise
        except BaseException as error:
            outcome = _failed(run, error)
        else:
            outcome = _returned(run, value)
        finally:
            run.message.release()
        return outcome

    def timed_out(self, run: Run) -> Outcome:
        """Return the outcome of a run that was stopped at its time limit."""
        run.message.release()
        return timeout_outcome(
            run.consumer, run.policy, attempts=run.job.attempts, crashes=run.job.crashes, trace=run.trace
        )

    def canceled(self, run: Run) -> Outcome:
        """Return the outcome of an async handler that was cancelled from within."""
        run.message.release()
        return _after(run, Failure(errors.CANCELED, "the handler was cancelled", True, run.trace))

    def last_resort(self, job: Job, error: BaseException) -> Outcome:
        """Return the outcome of a job around which kq itself failed: once more after a while, charged."""
        failure = Failure(errors.INTERNAL, f"kq failed around the handler: {type(error).__name__}", True)
        policy = self._specs(job.queue).policy
        consumer = self._router.resolve(job.queue, None, job.consumer)
        if consumer is not None:
            policy = consumer.policy(policy)
        return after_failure(failure, policy, attempts=job.attempts + 1, crashes=job.crashes)

    def conclude(self, run: Run, outcome: Outcome) -> Outcome | None:
        """Return the outcome of a run if it counts; None where the message was settled before, which is logged."""
        if run.message.claim():
            return outcome
        failure = outcome.failure
        if failure is not None:
            facts = {"queue": run.job.queue, "message_id": run.job.id, "action": "failed_late"}
            if failure.traceback:
                facts["traceback"] = failure.traceback
            logger.error(
                "%s %s failed after it had been settled, which stands: %s",
                run.job.queue, run.job.id, failure.message, extra=facts,
            )  # fmt: skip
        return None

    def _call(self, consumer: Consumer) -> Callable[[Message, Any], Any]:
        """Return a consumer's handler inside the middleware onion."""
        call = self._calls.get((consumer.queue, consumer.name))
        if call is None:
            handler = consumer.handler
            call = lambda message, payload: handler(payload)  # noqa: E731 - the innermost layer
            for middleware in reversed(self._middleware):
                call = _wrap(middleware, call)
            self._calls[consumer.queue, consumer.name] = call
        return call


def timeout_outcome(
    consumer: Consumer, policy: RetryPolicy, *, attempts: int, crashes: int, trace: str = ""
) -> Outcome:
    """Return the outcome of a run that passed its time limit, also where its process was killed for it."""
    text = f"handler {consumer.name} ran past its timeout of {consumer.timeout:g} s"
    failure = Failure(errors.TIMEOUT, text, True, trace)
    return after_failure(failure, policy, attempts=attempts + 1, crashes=crashes)


def _wrap(middleware: HandleMiddleware, call: Callable[[Message, Any], Any]) -> Callable[[Message, Any], Any]:
    return lambda message, payload: middleware(message, payload, lambda value: call(message, value))


def _returned(run: Run, result: Any) -> Outcome:
    if result is False:
        return _after(run, Failure(errors.INTERNAL, "the handler returned False", True))
    if result is not None and (lazy := _lazy(result)):
        # It has not run, so the message is not done; and it will not run another time either.
        why = f"handler {run.consumer.name} is no {lazy}; it did not run"
        return _after(run, Failure(errors.INVALID, why, False))
    return DONE


def _lazy(result: Any) -> str:
    """Say what a handler has returned instead of running; empty where it has run."""
    try:
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                # Somebody may be running it.
                with suppress(Exception):
                    result.close()
            return "async function, but returned something to await"
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            return "plain function, but returned a generator"
    except Exception:
        # It does not let itself be looked at, as some proxies, so it is none of these.
        return ""
    return ""


def _failed(run: Run, error: BaseException) -> Outcome:
    job = run.job
    run.out_of_memory = isinstance(error, MemoryError)
    if not isinstance(error, Retry):
        return _after(run, describe(error))
    delay = getattr(error, "delay", None)
    if not isinstance(delay, (int, float)) or isinstance(delay, bool) or not 0 <= delay <= limit.MAX_DELAY:
        delay = None
    # Plain, as kind and message: what derives from it cannot be sent on.
    delay = None if delay is None else float(delay)
    failure = Failure(errors.INTERNAL, "the handler asked for a retry", True)
    if getattr(error, "count", True):
        return _after(run, failure, delay)
    wait = run.policy.backoff.delay(job.attempts + 1) if delay is None else delay
    return Outcome("retry", wait, job.attempts, job.crashes, failure=failure)


def _after(run: Run, failure: Failure, delay: float | None = None) -> Outcome:
    job = run.job
    return after_failure(failure, run.policy, attempts=job.attempts + 1, crashes=job.crashes, delay=delay)


def describe(error: BaseException) -> Failure:
    """Return an exception as a value: its kind, its message, whether to retry, and the traceback's end.

    Whatever the exception is like: people derive from ours, forget to call ours, and overwrite attributes.
    """
    trace = _trace(error)
    if not isinstance(error, errors.Error):
        return Failure(errors.INTERNAL, clip(f"{type(error).__name__}: {_words(error)}", MAX_MESSAGE), True, trace)
    kind = getattr(error, "kind", None)
    if not isinstance(kind, str) or kind not in errors.RETRYABLE:
        kind = type(error).default_kind
    # Plain text: what derives from it cannot be sent on.
    kind = str.__str__(kind)
    retryable = getattr(error, "retryable", None)
    if not isinstance(retryable, bool):
        retryable = errors.RETRYABLE[kind]
    message = getattr(error, "message", None)
    text = message if isinstance(message, str) else _words(error)
    return Failure(kind, clip(text, MAX_MESSAGE), retryable, trace)


def _trace(error: BaseException) -> str:
    try:
        frames = error.__traceback__
        # Our own frames on the way to the handler tell its author nothing.
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(HERE):
            frames = frames.tb_next
        lines = "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
    except Exception as broken:
        lines = f"{type(error).__name__} (its traceback cannot be shown: {type(broken).__name__})"
    return clip(lines, MAX_TRACEBACK, end=True)


def _words(error: BaseException) -> str:
    """Return an exception's text; its ``__str__`` is the user's code and may fail as well."""
    try:
        return str(error)
    except Exception as other:
        return f"(its text cannot be had: {type(other).__name__})"
