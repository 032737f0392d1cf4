"""Publishing: check everything, build envelopes, have the broker confirm them."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock, RLock, get_ident
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Any, Final

from kq import clock, codec, forking, header, limit
from kq.backend import Backend, Publication, QueueSpec, Unconfirmed
from kq.driver import MAIN
from kq.envelope import WIRE_VERSION, Envelope
from kq.errors import Error, Internal, Invalid, NotFound, PermissionDenied
from kq.group_commit import GroupCommit, late
from kq.registry import HasRegistry, registry_of
from kq.signature import HEADER

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from kq.async_commit import AsyncCommit


#: Messages that are checked and encoded on the event loop at most; more of them would hold it up.
_FEW: Final = 20


@dataclass(frozen=True, slots=True)
class Draft:
    """What is about to be published, as publishing middleware sees it; nothing is checked yet.

    Attributes:
        queue_id: Where to.
        payloads: What, one for each message.
        headers: For each of them, or None.
        delay: Seconds or ``timedelta`` that the broker holds them back, or None.
        at: The moment until which it does instead, or None.
        expires: Seconds after which a message is dead-lettered instead of run, or None.
        message_id: The id of a single message, where the publisher chose one.
        deadline: When the publisher wants to know, on the monotonic clock; None for ``publish_timeout`` from now.
    """

    queue_id: str
    payloads: Sequence[Any]
    headers: Any = None
    delay: Any = None
    at: Any = None
    expires: Any = None
    message_id: Any = None
    deadline: float | None = None


#: ``(draft, call_next) -> ids``: return ``call_next(draft)``, or with a draft of your own.
PublishMiddleware = Callable[[Draft, Callable[[Draft], list[str]]], list[str]]


class Producer:
    """Publishes messages. Thread-safe; survives forks.

    ``publish`` and ``publish_many`` block until the broker has confirmed, at most ``publish_timeout``
    seconds; ``apublish`` and ``apublish_many`` are the same without blocking the event loop.

    Args:
        app_or_url: An app, or a broker URL.
        middleware: Around every publish, outermost first, within the app's own.
    """

    def __init__(self, app_or_url: HasRegistry | str, *, middleware: Sequence[PublishMiddleware] = ()) -> None:
        self._registry, self._own = registry_of(app_or_url)
        self._middleware = (*self._registry.on_publish, *limit.functions("middleware", middleware))
        #: Threads that are handing something to a pool, whose own lock a signal's handler would wait for in vain; and
        #: the pools that such a handler has closed, to be shut down after that.
        self._submitting: set[int] = set()
        self._left_open: list[ThreadPoolExecutor] = []
        self._reset()
        self._registry.on_reset(self._reset)

    def _reset(self) -> None:
        #: By driver: a broker that is slow or away keeps nobody from publishing to another.
        self._commits: dict[str, GroupCommit] = {}
        #: For async callers, by driver as well.
        self._async_commits: dict[str, AsyncCommit] = {}
        #: For those whose messages are many, or go through middleware, which may block; and what they have to do.
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._submitted: set[Future[list[str]]] = set()
        # A signal's handler may close it, in a thread that holds it.
        self._threads_lock = RLock()

    def publish(
        self,
        queue_id: str,
        data: Any,
        headers: Any = None,
        *,
        delay: Any = None,
        at: Any = None,
        expires: Any = None,
        message_id: str | None = None,
    ) -> str:
        """Publish one message and return its id, once the broker has stored it.

        A lost connection is reopened and the publish tried again under the same id, so a message may
        arrive twice, but it is never dropped silently.

        Args:
            queue_id: Where to, e.g. ``"app:emails"``.
            data: Any JSON value that is not empty; bytes too on a msgpack queue.
            headers: Strings, numbers and bools by name.
            delay: Seconds or ``timedelta`` that the broker holds the message back, at most 365 days.
            at: An aware ``datetime`` until which it does, instead; in the past means now.
            expires: Seconds or ``timedelta`` after which the message is dead-lettered instead of run.
            message_id: An id of your own; while a message of that id is queued a second one has no effect
                (not on RabbitMQ).

        Raises:
            Invalid: If the message breaks a rule.
            PermissionDenied: If a policy says no; ``details["action"]`` is ``queue.publish`` or
                ``queue.publish.queue``.
            NotFound: If the queue is not declared and ``create_queues`` is off.
            Conflict: If the queue exists with other values than declared.
            Internal: If the broker did not confirm; retryable, ``details["reason"]`` says why.
        """
        return self._send(Draft(queue_id, (data,), headers, delay, at, expires, message_id))[0]

    def publish_many(
        self,
        queue_id: str,
        payloads: Iterable[Any],
        headers: Any = None,
        *,
        delay: Any = None,
        at: Any = None,
        expires: Any = None,
    ) -> list[str]:
        """Publish messages, pipelined, and return their ids once the broker has stored them all.

        Everything is checked before anything is sent. Arguments and errors are those of `publish`; when
        the broker did not confirm all, ``details["published"]`` lists the ids that are safe. Where one of several
        payloads is `Invalid`, ``details["index"]`` is its place.
        """
        return self._send(Draft(queue_id, _several(payloads), headers, delay, at, expires))

    async def apublish(
        self,
        queue_id: str,
        data: Any,
        headers: Any = None,
        *,
        delay: Any = None,
        at: Any = None,
        expires: Any = None,
        message_id: str | None = None,
    ) -> str:
        """Publish one message without blocking the event loop; otherwise as `publish`."""
        return (await self._send_async(Draft(queue_id, (data,), headers, delay, at, expires, message_id)))[0]

    async def apublish_many(
        self,
        queue_id: str,
        payloads: Iterable[Any],
        headers: Any = None,
        *,
        delay: Any = None,
        at: Any = None,
        expires: Any = None,
    ) -> list[str]:
        """Publish messages without blocking the event loop; otherwise as `publish_many`."""
        return await self._send_async(Draft(queue_id, _several(payloads), headers, delay, at, expires))

    def close(self) -> None:
        """Give up the connection if it is the producer's own. Idempotent.

        What is being published on behalf of tasks is waited for, ``publish_timeout`` seconds at most.
        """
        forking.notice()
        until = monotonic() + self._registry.settings.publish_timeout
        with self._threads_lock:
            commits, self._async_commits = self._async_commits, {}
            threads, self._threads = self._threads, {}
            submitted = list(self._submitted)
        for async_commit in commits.values():
            async_commit.close(max(0.0, until - monotonic()))
        if get_ident() in self._submitting:
            self._left_open += threads.values()
        else:
            _shut_down(threads.values(), submitted, max(0.0, until - monotonic()))
        if self._own:
            self._registry.close()

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, draft: Draft) -> list[str]:
        forking.notice()
        if not self._middleware:
            return self._publish(draft)
        call: Callable[[Draft], list[str]] = self._publish
        for middleware in reversed(self._middleware):
            call = _wrap(middleware, call)
        return call(draft)

    def _publish(self, draft: Draft) -> list[str]:
        publications = self._prepare(draft)
        if not publications:
            return []
        commit = self._commit(publications[0].queue.driver)
        timeout = self._registry.settings.publish_timeout
        if draft.deadline is not None:
            timeout = draft.deadline - monotonic()
            if timeout <= 0:
                raise Internal("there was no thread to publish in all the time", details={"reason": "timeout"})
        return _confirmed(publications, commit.publish(publications, timeout))

    def _prepare(self, draft: Draft) -> list[Publication]:
        """Check a draft, in the order that the documentation promises, and return what to send."""
        queue_id = limit.queue_id(draft.queue_id)
        # Middleware may give anything, also what can be gone through once.
        payloads = _several(draft.payloads)
        for index, payload in enumerate(payloads):
            if codec.is_empty(payload):
                expected = "expected a value, or a text or collection with something in it"
                raise _placed(Invalid(f"the data is empty: {payload!r}; {expected}"), index, payloads)
        headers = header.check(draft.headers)
        now = clock.now()
        delay = limit.holding_time(draft.delay, draft.at, now)
        expires = None if draft.expires is None else limit.seconds("expires", draft.expires)
        id = None if draft.message_id is None else limit.message_id(draft.message_id)
        if id is not None and len(payloads) > 1:
            raise Invalid(f"message_id: expected none for several messages, got {id!r} for {len(payloads)}")
        spec = self._registry.spec(queue_id)
        writer = codec.named(spec.codec)
        most = self._registry.settings.max_body
        bodies: list[bytes] = []
        try:
            for payload in payloads:
                body = writer.encode(payload)
                limit.body_size(body, most)
                bodies.append(body)
        except Invalid as error:
            raise _placed(error, len(bodies), payloads) from None
        self._registry.guard.publish(queue_id, headers)
        if not (self._registry.create_queues or self._registry.is_declared(queue_id)):
            raise NotFound(f"queue {queue_id} is not declared, and create_queues is off; declare it with app.queue()")
        properties: dict[str, Any] = {
            "content_type": writer.content_type,
            "content_encoding": writer.content_encoding,
            "delivery_mode": 2,
            "priority": header.priority(headers["priority"]) if "priority" in headers else header.NORMAL,
            "timestamp": int(now),
        }
        wire: dict[str, Any] = {"x_kq": WIRE_VERSION}
        if headers:
            properties.update(header.properties(headers))
            wire.update(headers)
        if delay:
            wire["x_due_at"] = now + delay
        if expires is not None:
            wire["x_expires_at"] = now + expires
        envelopes = [Envelope(id or _new_id(), wire, properties, body) for body in bodies]
        signing = self._registry.signing
        if signing is not None and signing.signs:
            for envelope in envelopes:
                envelope.headers = {**wire, HEADER: signing.sign(queue_id, envelope, delay)}
        return [Publication(spec, envelope, delay) for envelope in envelopes]

    def _commit(self, driver: str) -> GroupCommit:
        """Return what publishes to a driver's broker, for all threads the same."""
        commit = self._commits.get(driver)
        if commit is None:
            slowest, ours = self._registry.driver(driver).timeout, self._registry.settings.publish_timeout
            made = GroupCommit(
                partial(self._declare_and_publish, driver),
                lambda: self._registry.backend(driver).capabilities.concurrent_publishes,
                is_prompt=slowest is None or slowest <= ours,
                is_ready=partial(self._registry.are_ensured, driver),
            )
            commit = self._commits.setdefault(driver, made)
        return commit

    def _async_commit(self, driver: str) -> AsyncCommit:
        """Return what publishes to a driver's broker for all event loops."""
        commit = self._async_commits.get(driver)
        if commit is None:
            # Imported here: who publishes without an event loop does without the largest of all modules.
            with self._registry.importing():
                from kq.async_commit import AsyncCommit

            made = AsyncCommit(self._commit(driver), partial(self._sender, driver))
            with self._threads_lock:
                commit = self._async_commits.setdefault(driver, made)
        return commit

    def _sender(self, driver: str) -> Callable[[Sequence[Publication]], Unconfirmed | None] | None:
        """Return what sends to a driver's broker without waiting; None where nothing does, as before it is open."""
        backend = self._registry.opened(driver)
        return backend.send if backend is not None and backend.capabilities.sends else None

    def _declare_and_publish(self, driver: str, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        # Which has nothing ensured when it is opened here.
        backend = self._registry.backend(driver)
        if self._registry.are_ensured(driver, batch):
            results = backend.publish(batch, timeout)
        else:
            results = self._publish_declared(backend, batch, timeout)
        if any(results):
            for publication, result in zip(batch, results, strict=True):
                if result is not None and result.details.get("reason") == "unroutable":
                    # Somebody deleted the queue; the next publish declares it anew.
                    self._registry.forget(publication.queue.id)
        return results

    def _publish_declared(self, backend: Backend, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """Publish to queues that have to be declared first, as far as they can be."""
        deadline = monotonic() + timeout
        refused: dict[str, Error] = {}
        specs: dict[str, QueueSpec] = {publication.queue.id: publication.queue for publication in batch}
        for spec in specs.values():
            # Declaring takes its time, too, and for each of them.
            if monotonic() >= deadline:
                text = f"there was no time left to publish to queue {spec.id}; it was not sent"
                refused[spec.id] = Internal(text, details={"reason": "timeout"})
                continue
            try:
                self._registry.ensure(spec)
            except Error as error:
                refused[spec.id] = error
        left = max(0.0, deadline - monotonic())
        good = [p for p in batch if p.queue.id not in refused]
        answers = iter(backend.publish(good, left) if good else [])
        return [refused[p.queue.id] if p.queue.id in refused else next(answers) for p in batch]

    async def _send_async(self, draft: Draft) -> list[str]:
        forking.notice()
        if self._middleware or len(draft.payloads) > _FEW:
            return await self._send_in_thread(draft)
        publications = self._prepare(draft)
        if not publications:
            return []
        commit = self._async_commit(publications[0].queue.driver)
        return _confirmed(publications, await commit.publish(publications, self._registry.settings.publish_timeout))

    async def _send_in_thread(self, draft: Draft) -> list[str]:
        from asyncio import CancelledError, wait, wrap_future
        from concurrent.futures import ThreadPoolExecutor

        # What is no queue id is refused in the thread, where all is checked.
        driver = self._registry.spec(draft.queue_id).driver if isinstance(draft.queue_id, str) else MAIN
        context = contextvars.copy_context()
        # Waiting for one of the threads counts as well.
        deadline = monotonic() + self._registry.settings.publish_timeout
        draft = replace(draft, deadline=deadline)
        me = get_ident()
        self._submitting.add(me)
        # A pool keeps what it has said that it has no thread for: whoever has this first says what becomes of it.
        claim = Lock()

        def send() -> list[str]:
            return context.run(self._send, draft) if claim.acquire(blocking=False) else []

        try:
            with self._threads_lock:
                threads = self._threads.get(driver)
                if threads is None:
                    threads = self._threads[driver] = ThreadPoolExecutor(16, thread_name_prefix="kq-publish")
            future = threads.submit(send)
        except (RuntimeError, MemoryError) as error:
            so = "it was not sent" if claim.acquire(blocking=False) else "it may arrive all the same"
            text = f"no thread to publish with: {error}; {so}"
            raise Internal(text, details={"reason": "unavailable"}) from None
        finally:
            self._submitting.discard(me)
            left_open, self._left_open = self._left_open, []
            _shut_down(left_open, (), 0.0)
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        waiting = wrap_future(future)
        try:
            await wait([waiting], timeout=deadline - monotonic())
        except CancelledError:
            if not waiting.cancel() and not waiting.cancelled():
                # It has failed just now, which nobody is told.
                waiting.exception()
            raise
        if not waiting.done() and claim.acquire(blocking=False):
            # Those that have all the threads may wait for something that never comes, in middleware.
            waiting.cancel()
            raise late(is_taken=False)
        return await waiting


def _shut_down(pools: Iterable[ThreadPoolExecutor], submitted: Collection[Future[list[str]]], patience: float) -> None:
    """Have pools end when they have done what they have been given, and wait for that so many seconds at most."""
    for pool in pools:
        pool.shutdown(wait=False)
    if submitted:
        from concurrent.futures import wait

        wait(submitted, timeout=patience)


def _confirmed(publications: Sequence[Publication], results: Sequence[Error | None]) -> list[str]:
    """Return the ids of what the broker has confirmed, all of it; raise what it has answered otherwise."""
    ids = [publication.envelope.id for publication in publications]
    failed = [error for error in results if error is not None] if any(results) else []
    if not failed:
        return ids
    first = failed[0]
    safe = [id for id, error in zip(ids, results, strict=True) if error is None]
    text = first.message if len(ids) == 1 else f"{len(failed)} of {len(ids)} messages: {first.message}"
    details = {**first.details, "published": safe}
    if isinstance(first, PermissionDenied):
        # By the broker: its account may be mended, and what a policy says is said before.
        raise Internal(text, details=details)
    # A new error each time: several threads may have been given the same one.
    raise type(first)(text, retryable=first.retryable, details=details)


def _placed(error: Invalid, index: int, payloads: Sequence[Any]) -> Invalid:
    """Return an error about one of several payloads so that it says about which."""
    if len(payloads) == 1:
        return error
    return Invalid(f"payloads[{index}]: {error.message}", details={**error.details, "index": index})


def _several(payloads: Iterable[Any]) -> Sequence[Any]:
    if type(payloads) is tuple:
        # As `publish` gives it, and in a tenth of the time.
        return payloads
    if isinstance(payloads, (str, bytes, Mapping)) or not isinstance(payloads, Iterable):
        raise Invalid(f"payloads: expected several, as in a list, got one {type(payloads).__name__}; publish takes one")
    return list(payloads)


def _new_id() -> str:
    """Return a UUID of version 7 in hexadecimal: milliseconds, then chance (RFC 9562, section 5.7).

    Ids that are published together sort together: an index on them, as in SQLite, is changed in one place then, not
    in as many as there are messages.
    """
    data = bytearray((time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10))
    data[6] = data[6] & 0x0F | 0x70
    data[8] = data[8] & 0x3F | 0x80
    return data.hex()


def _wrap(middleware: PublishMiddleware, call: Callable[[Draft], list[str]]) -> Callable[[Draft], list[str]]:
    def publish(draft: Draft) -> list[str]:
        ids = middleware(draft, call)
        if not isinstance(ids, list) or (not ids and draft.payloads):
            raise Invalid(
                f"on_publish: expected {getattr(middleware, '__qualname__', middleware)} to return what call_next "
                f"returned, the ids, got {ids!r}; what it has passed on is published"
            )
        return ids

    return publish
