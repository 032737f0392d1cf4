"""The worker from the outside: options, start, signals, stop.

1. Reach the brokers and declare the queues.
2. Start the pool and the fetchers, one for each broker.
3. Let the supervisor turn until told to stop.
4. Stop fetching, let handlers finish for a while, release the rest, disconnect.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Event, Thread, current_thread, main_thread
from time import monotonic
from typing import Any, Protocol

from kq import config, limit
from kq.admission import Admission
from kq.backend import Backend, QueueSpec, UntrustedBroker, insist
from kq.driver import Driver, naming
from kq.errors import Internal, Invalid
from kq.executor import Executor
from kq.fetcher import Fetcher
from kq.idleness import Idleness
from kq.intake import Intake
from kq.message import is_handling
from kq.registry import HasRegistry
from kq.router import Consumer, limits
from kq.worker.allocation import give_large_blocks_back
from kq.worker.announcement import announcement
from kq.worker.flight import Tally
from kq.worker.frame import Hello
from kq.worker.option import WorkerOptions
from kq.worker.order import Order
from kq.worker.pool import Pool
from kq.worker.process import Process
from kq.worker.process_pool import ProcessPool
from kq.worker.reload import Trial
from kq.worker.supervisor import Supervisor
from kq.worker.thread_pool import ThreadPool

logger = logging.getLogger("kq.worker")

#: Messages that a worker holds for each child at most, unless told otherwise.
_PREFETCH_PER_CHILD = 1000
#: Seconds between tries to reach the broker at the start.
_CONNECT_PAUSE = 0.5
#: Seconds that children get to end by themselves once their work is done.
_END_PATIENCE = 5.0
#: Seconds that the last settlements may take.
_SETTLE_PATIENCE = 10.0
#: Seconds ahead that ``burst`` waits for delayed messages.
_BURST_HORIZON = 60.0
#: Seconds between two turns of the loop in which nothing happens.
_IDLE_TURN = 5.0


class Runnable(HasRegistry, Protocol):
    """An app, as far as a worker is concerned."""

    def executor(self) -> Executor:
        """Return what runs the app's handlers."""
        ...

    def fingerprint(self) -> str:
        """Return a text that is another one whenever a worker would have to work otherwise."""
        ...


class Worker:
    """Consumes an app's queues and runs its handlers.

    ``run`` blocks; ``start`` runs it in a thread; ``stop`` ends either. A context manager starts and stops.
    In the main thread TERM and INT stop it, a second one at once; HUP reloads code and configuration, or
    says why it cannot; USR1 logs what runs where.

    Args:
        app: The app.
        app_path: ``module:attribute``, by which children find the app; without it only a pool of threads
            is possible.
        options: How to work.
        idle_until: For ``app.drain``: the moment until which to wait for what is due.
        quiet: Whether to keep the start and the end out of the log.
        forks: Processes that wait to become the first children. Those that are used are taken from the list, and
            those that do not fit the options are ended; any others are still the caller's.
        in_file: Which options are the configuration file's to say, if it does, now and at each reload.
        can_restart: Whether whoever calls `run` sees to it that a worker with ``restart`` is started anew.

    Raises:
        Invalid: If there is nothing to consume, or the pool does not fit.
    """

    def __init__(
        self,
        app: Runnable,
        *,
        app_path: str | None = None,
        options: WorkerOptions | None = None,
        idle_until: float | None = None,
        quiet: bool = False,
        forks: list[Process] | None = None,
        in_file: Collection[str] = (),
        can_restart: bool = False,
    ) -> None:
        self._app = app
        self._app_path = app_path
        self.options = options or WorkerOptions()
        self._idle_until = idle_until
        self._quiet = quiet
        self._forks = [] if forks is None else forks
        self._in_file = frozenset(in_file)
        self._can_restart = can_restart
        self._registry = app.registry
        self._consumers = self._choose()
        self._specs = {queue: self._registry.spec(queue) for queue in self._consumers}
        #: Those whose queues are consumed, by name.
        self._drivers = {spec.driver: self._registry.driver(spec.driver) for spec in self._specs.values()}
        #: What is other than its options say.
        self.warnings: list[str] = []
        self._threads = self._pool_kind() == "threads"
        self.processes = 1 if self._threads else (self.options.processes or os.cpu_count() or 1)
        self._pool: Pool | None = None
        self._supervisor: Supervisor | None = None
        self._thread: Thread | None = None
        self._stop = Order()
        self._hurry = False
        self._replace = False
        self._trial: Trial | None = None
        self._dump = False
        #: What the app, and the files that its connections were made with, were like when it started.
        self._fingerprint = ""
        #: Whether it has stopped in order to be started anew, with new code and configuration.
        self.restart = False
        self._ready = Event()
        self._failure: BaseException | None = None

    @property
    def tally(self) -> Tally:
        """What this worker has done so far."""
        return Tally() if self._supervisor is None else self._supervisor.tally

    def run(self) -> None:
        """Work until stopped, or, in burst mode, until the queues are empty.

        Raises:
            Internal: If a broker cannot be reached within ``connect_timeout``.
            PermissionDenied: If a broker refuses us, or a policy does not allow ``queue.consume.queue``.
            Conflict: If a queue exists with other values than declared.
            StartFailed: If the children cannot load the app.
        """
        if self._app_path is not None:
            # The process is the worker's; where it is embedded, memory is its host's affair.
            give_large_blocks_back()
            self._fingerprint = self._app.fingerprint()
        with ExitStack() as stack:
            backends = stack.enter_context(self._backends())
            for number, handler in self._install_signals().items():
                stack.callback(signal.signal, number, handler)
            pool = self._pool = self._make_pool()
            try:
                # Children load the app while the brokers are reached.
                with pool.lock:
                    pool.start()
                self._connect(backends)
            except BaseException as error:
                pool.close(0.0)
                if self._stop.is_set() and isinstance(error, Internal):
                    logger.info("stopped before the broker was reached: %s", error, extra={"action": "stopped"})
                    return
                raise
            self._work(pool, backends)

    def rehearse(self) -> None:
        """Do what `run` does before it works: ask the policies, reach the brokers, declare the queues.

        Raises as `run` does.
        """
        with self._backends() as backends:
            self._connect(backends)

    @contextmanager
    def _backends(self) -> Iterator[dict[str, Backend]]:
        """Open a backend for each driver that is consumed, if consuming is allowed; closed at the end."""
        guard = self._registry.guard
        with guard.serving():
            for queue in self._consumers:
                guard.consume(queue)
        with ExitStack() as stack:
            backends: dict[str, Backend] = {}
            for driver in self._drivers:
                backends[driver] = self._registry.open(driver)
                stack.callback(backends[driver].close)
            yield backends

    def start(self) -> None:
        """Run in a thread of its own, and return once it fetches.

        Once it has stopped, or has failed to start, it may be started again.

        Raises:
            Invalid: If it runs already.
            Error: What `run` raised, if it did so at the start.
        """
        if self._thread is not None and self._thread.is_alive():
            raise Invalid("the worker runs already; stop it first, or make another one")
        self._stop.clear()
        self._ready.clear()
        self._hurry = False
        self._failure = None
        self._thread = Thread(target=self._run_in_thread, name="kq-worker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self, *, now: bool = False) -> None:
        """Stop fetching, let handlers finish within ``grace``, release the rest. Safe in any thread.

        Waits for the end, except in a handler.

        Args:
            now: Release at once what is not done. Threads cannot be killed: with a pool of threads a handler
                that still runs goes on, while its message may run elsewhere.
        """
        self._hurry = self._hurry or now
        self._stop.set()
        self._wake()
        thread = self._thread
        # A handler that stops its own worker must not wait for itself.
        if thread is not None and thread is not current_thread() and not is_handling():
            thread.join()

    def reload(self) -> None:
        """Do what HUP asks for, once it runs: load code and configuration anew, or say why not. Safe in any thread."""
        self._replace = True
        self._wake()

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._failure = error
            if self._ready.is_set():
                logger.exception("the worker failed", extra={"action": "worker_failed"})
        finally:
            self._ready.set()

    def _choose(self) -> dict[str, tuple[Consumer, ...]]:
        router = self._registry.router
        consumers = {consumer.queue: router.of(consumer.queue) for consumer in router}
        if self.options.queues is not None:
            for queue in self.options.queues:
                limit.queue_id(queue)
                if queue not in consumers:
                    logger.warning(
                        "queue %s has no handler in %s: it is not consumed", queue, self._registry.name,
                        extra={"action": "no_handler"},
                    )  # fmt: skip
            consumers = {queue: consumers[queue] for queue in self.options.queues if queue in consumers}
        if not consumers:
            known = ", ".join(dict.fromkeys(consumer.queue for consumer in router)) or "none"
            raise Invalid(
                f"nothing to consume: app {self._registry.name!r} has handlers for {known}; "
                "declare one with @app.consumer(queue_id), or as a queue.consumer in the configuration file"
            )
        return consumers

    def _each_consumer(self, driver: str | None = None) -> Iterator[Consumer]:
        for queue, competing in self._consumers.items():
            if driver is None or self._specs[queue].driver == driver:
                yield from competing

    def _specs_on(self, driver: str) -> list[QueueSpec]:
        return [spec for spec in self._specs.values() if spec.driver == driver]

    def _pool_kind(self) -> str:
        urls = (self._registry.settings.broker, *(driver.url for driver in self._drivers.values()))
        in_memory = [config.scheme(url) == "memory" for url in urls]
        memory = any(in_memory)
        kind = self.options.pool
        if kind == "processes" and all(in_memory):
            self.warnings.append("pool: memory:// lives in one process; handlers run in threads of it")
            kind = None
        if kind == "processes" and memory:
            raise Invalid("pool: memory:// lives in one process; use --pool threads, or another broker")
        if kind == "processes" and self._app_path is None:
            raise Invalid("pool: children need the app's path, package.module:attribute; use threads without")
        if kind is None:
            kind = "threads" if memory or self._app_path is None or sys.platform == "win32" else "processes"
        return kind

    def _connect(self, backends: Mapping[str, Backend]) -> None:
        until = monotonic() + self.options.connect_timeout
        warnings = []
        for driver, backend in backends.items():
            found = self._reach(driver, backend, until)
            if self._registry.settings.durability == config.REQUIRED:
                with naming(driver):
                    insist(found)
            warnings += [f"driver {driver}: {warning}" if driver else warning for warning in found]
        if not self._quiet:
            self._announce(warnings)

    def _reach(self, driver: str, backend: Backend, until: float) -> list[str]:
        """Reach a broker and declare its queues, and return its warnings."""
        longest = max((c.timeout for c in self._each_consumer(driver) if c.timeout), default=None)
        while True:
            try:
                with naming(driver):
                    warnings = backend.check(longest)
                    for spec in self._specs_on(driver):
                        backend.declare(spec, create=True, exact=self._registry.is_exact(spec.id))
                return warnings
            except Internal as error:
                is_final = isinstance(error, UntrustedBroker) or not error.retryable
                if is_final or monotonic() + _CONNECT_PAUSE > until or self._stop.is_set():
                    raise
                if not self._quiet:
                    logger.warning("cannot reach the broker yet: %s", error, extra={"action": "connect"})
                self._stop.wait(_CONNECT_PAUSE)

    def _announce(self, warnings: list[str]) -> None:
        size = self.options.concurrency
        pool = f"{size} threads in this process" if self._threads else f"{self.processes} processes x {size} handlers"
        consumers = [(consumer, self._specs[consumer.queue].driver) for consumer in self._each_consumer()]
        text = announcement(self._registry.name, self._drivers.values(), pool, consumers)
        logger.info("%s", text, extra={"action": "start"})
        registry = self._registry
        found = [*config.untold_variables(registry.variables), *registry.risks, *self.warnings, *warnings]
        for warning in found:
            logger.warning("%s", warning, extra={"action": "warning"})

    def _make_pool(self) -> Pool:
        options = self.options
        self._choose_forks()
        timeouts = [consumer.timeout for consumer in self._each_consumer() if consumer.timeout is not None]
        if self._threads:
            return ThreadPool(
                self._app.executor(),
                concurrency=options.concurrency,
                shortest_timeout=min(timeouts, default=None),
            )
        assert self._app_path is not None
        hello = Hello(
            app=self._app_path,
            overrides=self._registry.overrides,
            queues=list(self._consumers),
            concurrency=options.concurrency,
            log_level=options.log_level,
            log_format=options.log_format,
            fingerprint=self._fingerprint,
        )
        return ProcessPool(
            self.processes,
            hello,
            self._timeout_of if timeouts else None,
            max_tasks=options.max_tasks_per_child,
            forks=self._forks,
        )

    def _choose_forks(self) -> None:
        """End those forks that cannot become children of this worker."""
        wanted = 0 if self._threads else self.processes
        fit = [fork for fork in self._forks if fork.concurrency == self.options.concurrency][:wanted]
        for fork in set(self._forks).difference(fit):
            self._forks.remove(fork)
            fork.end()

    def _timeout_of(self, tag: int) -> float | None:
        assert self._supervisor is not None
        return self._supervisor.timeout_of(tag)

    def _work(self, pool: Pool, backends: Mapping[str, Backend]) -> None:
        prefetch = self.options.prefetch or self.processes * _PREFETCH_PER_CHILD
        supervisor = self._supervisor = Supervisor(
            pool,
            consumers=self._consumers,
            specs=self._specs,
            max_deliveries=self._registry.settings.max_deliveries,
            max_body=self._registry.settings.max_body,
            prefetch=prefetch,
        )
        idleness = Idleness(self._idle) if self.options.burst or self._idle_until is not None else None
        fetchers = {
            driver: self._fetcher(self._drivers[driver], backend, supervisor, prefetch, idleness)
            for driver, backend in backends.items()
        }
        intake = Intake({spec.id: fetchers[spec.driver] for spec in self._specs.values()})
        intake.hold(0)
        supervisor.attach(intake)
        try:
            intake.start()
            supervisor.turn(0.0)
            self._ready.set()
            while not self._stop.is_set():
                with pool.lock:
                    self._obey(pool)
                supervisor.turn(self._patience())
            self._wind_down(pool, supervisor)
        finally:
            with ExitStack() as ends:
                # The last first; each of them, whatever interrupts another.
                ends.callback(self._end_intake, intake)
                ends.callback(supervisor.release_all)
                ends.callback(lambda: supervisor.take_last(pool.close(0.0 if self._hurry else _END_PATIENCE)))
                if not supervisor.is_stopping:
                    # Interrupted: nothing that waits is to start now.
                    supervisor.stop_fetching()
            if not self._quiet:
                logger.info("stopped: %s", supervisor.tally, extra={"action": "stopped"})

    def _end_intake(self, intake: Intake) -> None:
        if not intake.stop(_SETTLE_PATIENCE):
            logger.warning(
                "a broker did not take the last settlements in time; those messages run again",
                extra={"action": "settle_failed"},
            )

    def _fetcher(
        self, driver: Driver, backend: Backend, supervisor: Supervisor, prefetch: int, idleness: Idleness | None
    ) -> Fetcher:
        specs = self._specs_on(driver.name)
        consumers = {spec.id: self._consumers[spec.id] for spec in specs}
        return Fetcher(
            backend,
            specs,
            driver=driver,
            prefetch=prefetch,
            lease=self._registry.settings.lease,
            limits=limits(consumers),
            auto_ack={queue for queue, competing in consumers.items() if competing[0].auto_ack},
            admission=Admission(self._registry.settings.max_body, self._registry.distrust, self._registry.router),
            on_deliveries=supervisor.arrived,
            on_lost=supervisor.lost,
            idleness=idleness,
            idle_until=lambda: self._idle_until or monotonic() + _BURST_HORIZON,
        )

    def _wind_down(self, pool: Pool, supervisor: Supervisor) -> None:
        supervisor.stop_fetching()
        until = monotonic() + (float("inf") if self._idle_until is not None else self.options.grace)
        if supervisor.in_hand and not self._quiet:
            logger.info(
                "stopping: up to %.0f s for %d messages in hand; a second signal releases them at once",
                self.options.grace, supervisor.in_hand,
                extra={"action": "stop"},
            )  # fmt: skip
        while supervisor.in_hand and not self._hurry and monotonic() < until:
            with pool.lock:
                self._obey(pool)
            supervisor.turn(min(_IDLE_TURN, max(0.0, until - monotonic())))

    def _patience(self) -> float:
        if self._idle_until is None:
            return _IDLE_TURN
        left = self._idle_until - monotonic()
        if left <= 0:
            self._stop.set()
        return max(0.0, min(_IDLE_TURN, left))

    def _obey(self, pool: Pool) -> None:
        if self._stop.is_set():
            # What was told to stop is not to start anything, itself least of all.
            self._replace, self._trial = False, None
        if self._replace and self._app_path is None:
            self._replace = False
            self._replace_children(pool)
        elif self._replace and self._app_path is not None and self._trial is None:
            self._replace = False
            queues = self.options.queues
            options = {
                "queues": None if queues is None else list(queues),
                "connect_timeout": self.options.connect_timeout,
                "pool": self.options.pool,
            }
            # What is the file's to say it may say otherwise now, or for the first time.
            options = {name: value for name, value in options.items() if name not in self._in_file}
            self._trial = Trial(self._app_path, self._registry.overrides, self._fingerprint, options, self._wake)
            self._trial.begin()
        if self._trial is not None and self._trial.ended:
            trial, self._trial = self._trial, None
            self._reload(pool, trial)
        if self._dump:
            self._dump = False
            pool.dump(str if self._supervisor is None else self._supervisor.name_of)

    def _replace_children(self, pool: Pool) -> None:
        if self._supervisor is not None:
            # What other code has said of a message does not hold any more.
            self._supervisor.forget_ends()
        pool.replace()

    def _reload(self, pool: Pool, trial: Trial) -> None:
        """Do what HUP asks for, now that it is known whether and how it can be done."""
        if trial.mistake:
            logger.error(
                "nothing is reloaded, the children go on with the old code and configuration; one that has to be "
                "replaced cannot start until this is mended: %s",
                trial.mistake, extra={"action": "reload_failed"},
            )  # fmt: skip
        elif trial.fingerprint == self._fingerprint and not self._threads:
            logger.info("replacing the children", extra={"action": "reload"})
            self._replace_children(pool)
        elif not self._can_restart:
            why = "handlers run in threads of this program"
            if trial.fingerprint != self._fingerprint:
                why = f"the app that {self._app_path} names has another configuration than the one that runs here"
            logger.error(
                "nothing is reloaded: %s; start it anew for that", why, extra={"action": "reload_failed"}
            )  # fmt: skip
        else:
            logger.info("finishing what runs, then starting anew", extra={"action": "reload"})
            # In this order: whoever is told to stop in between does not start anew.
            self.restart = True
            if self._stop.is_set():
                self.restart = False
            self._stop.set()
            # Else it would wait for something to do before it looks.
            self._wake()

    def _idle(self) -> None:
        self._stop.set()
        self._wake()

    def _wake(self) -> None:
        pool = self._pool
        if pool is not None:
            pool.wake()

    def _install_signals(self) -> dict[int, Any]:
        if current_thread() is not main_thread() or self._idle_until is not None:
            return {}

        def stop(number: int, frame: object) -> None:
            # A worker that is about to start anew is told to stop for the first time.
            self._hurry = self._stop.is_set() and not self.restart
            self.restart = False
            self._stop.set()
            self._wake()

        def reload(number: int, frame: object) -> None:
            self.reload()

        def dump(number: int, frame: object) -> None:
            self._dump = True
            self._wake()

        wanted = {"SIGTERM": stop, "SIGINT": stop, "SIGHUP": reload, "SIGUSR1": dump}
        numbers = {getattr(signal, name): handler for name, handler in wanted.items() if hasattr(signal, name)}
        return {number: signal.signal(number, handler) for number, handler in numbers.items()}
