"""Who is measured: task queues on brokers, with what they promise as they are set here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Final

#: Processes of a worker, and handlers of each.
PROCESSES: Final = 2
THREADS: Final = 8
#: Async handlers at once of a process: what taskiq has without being told.
TASKS: Final = 100


@dataclass(frozen=True)
class Contender:
    """A task queue on a broker.

    Attributes:
        name: Its name; what comes after a hyphen is a setting, and who has the same one is compared with whom.
        module: Its app, in ``benchmarks.apps``.
        packages: The distributions whose versions matter.
        command: Its worker, as arguments of the interpreter.
        guarantee: What becomes of a message whose worker dies, as it is set here.
        style: The kind of handler that its documentation begins with: ``sync`` or ``async``.
        styles: The kinds that it runs.
        copies: How often the command is started for two processes.
        retries: With which brokers, by their URL's scheme, it runs again what has failed, as soon as it can.
        delays: Whether it has delayed messages, kept without a program of their own.
        bends: Whether its app heeds all that `benchmarks.work` says of queues, headers and priorities.
        environment: More of what `benchmarks.work` reads.
        threads: Whether threads publish with it at the same time.
        tasks: Whether tasks of an event loop do.
        pause: Another command where handlers wait, if more processes are needed for `THREADS` handlers each.
        loop: Another command where handlers are async, if it is by itself not `TASKS` of them that one process runs.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    guarantee: str
    style: str = "sync"
    styles: tuple[str, ...] = ("sync",)
    copies: int = 1
    retries: tuple[str, ...] = ("redis", "amqp", "sqlite")
    delays: bool = False
    bends: bool = False
    threads: bool = True
    tasks: bool = False
    pause: tuple[str, ...] = ()
    loop: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether it can be measured here."""
        return bool(self.versions)

    @property
    def versions(self) -> dict[str, str]:
        """Its versions; empty if something is missing."""
        try:
            return {package: version(package) for package in self.packages}
        except PackageNotFoundError:
            return {}


_APPS: Final = "benchmarks.apps."
_ONCE: Final = "at least once"
_BOTH: Final = ("sync", "async")

_KQ_WORKER: Final = ("-m", "kq", "worker", _APPS + "kq_app:app", "-p", str(PROCESSES), "--log-level", "warning",
                     "-c")  # fmt: skip
_KQ = Contender(
    "kq", "kq_app", ("kq-tasks",), (*_KQ_WORKER, str(THREADS)),
    _ONCE, styles=_BOTH, delays=True, bends=True, tasks=True, loop=(*_KQ_WORKER, str(TASKS)),
)  # fmt: skip
#: Classic queues are Dramatiq's own choice; one broker's death may cost what they hold.
_CLASSIC: Final = {"BENCH_QUEUE_TYPE": "classic"}
_KQ_CLASSIC = replace(_KQ, name="kq-classic", environment=_CLASSIC, bends=False)
_CELERY_WORKER: Final = ("-m", "celery", "-A", _APPS + "celery_app:app", "worker", "-l", "ERROR", "--without-gossip",
                         "--without-mingle", "-c")  # fmt: skip
_CELERY = Contender(
    "celery", "celery_app", ("celery", "kombu"), (*_CELERY_WORKER, str(PROCESSES)),
    _ONCE + "; may lose", delays=True, pause=(*_CELERY_WORKER, str(PROCESSES * THREADS)),
)  # fmt: skip
_DRAMATIQ_WORKER: Final = ("-m", "dramatiq", _APPS + "dramatiq_app", "--processes", str(PROCESSES),
                           "--threads")  # fmt: skip
_DRAMATIQ = Contender(
    "dramatiq", "dramatiq_app", ("dramatiq",), (*_DRAMATIQ_WORKER, str(THREADS)),
    _ONCE, styles=_BOTH, delays=True, loop=(*_DRAMATIQ_WORKER, str(TASKS)),
)  # fmt: skip
_DRAMATIQ_CLASSIC = replace(_DRAMATIQ, name="dramatiq-classic", environment=_CLASSIC)
_TASKIQ_WORKER: Final = ("-m", "taskiq", "worker", _APPS + "taskiq_app:broker", "--workers", str(PROCESSES),
                         "--max-threadpool-threads", str(THREADS), "--ack-type", "when_executed", "--log-level",
                         "ERROR")  # fmt: skip
_TASKIQ = Contender(
    "taskiq", "taskiq_app", ("taskiq", "taskiq-redis"), _TASKIQ_WORKER, _ONCE, "async", _BOTH, threads=False,
    tasks=True,
)  # fmt: skip
_FASTSTREAM = Contender(
    "faststream", "faststream_app", ("faststream",),
    ("-m", "faststream", "run", _APPS + "faststream_app:app", "--workers", str(PROCESSES), "--log-level", "error"),
    _ONCE, "async", _BOTH, threads=False, tasks=True, retries=("amqp",),
)  # fmt: skip
_HUEY = Contender(
    "huey", "huey_app", ("huey",),
    ("-m", "huey.bin.huey_consumer", _APPS + "huey_app.huey", "-k", "thread", "-w", str(THREADS), "-q"),
    "at most once", copies=PROCESSES, delays=True,
)  # fmt: skip
_RQ = Contender(
    "rq", "rq_app", ("rq",),
    ("-m", "rq.cli", "worker", "-w", "rq.worker.SimpleWorker", "-q"), "at most once", copies=PROCESSES,
)  # fmt: skip

#: What is measured beside them: a client that does nothing but move as many bytes.
BARE: Final = Contender("bare client", "bare_app", ("redis", "amqp"), (), "none")

#: Who is measured on which broker, kq first.
CONTENDERS: Final[Mapping[str, tuple[Contender, ...]]] = {
    "redis": (_KQ, _CELERY, _DRAMATIQ, _TASKIQ, _FASTSTREAM, _HUEY, _RQ),
    "rabbitmq": (_KQ, _CELERY, _DRAMATIQ, _TASKIQ, _FASTSTREAM, _KQ_CLASSIC, _DRAMATIQ_CLASSIC),
    "sqlite": (_KQ, _HUEY),
}
