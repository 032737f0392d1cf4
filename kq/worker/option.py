"""How a worker works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kq import limit
from kq.errors import Invalid

#: Seconds for which a worker tries to reach its brokers at its start, unless told otherwise.
CONNECT_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works. Durations are seconds.

    Attributes:
        queues: The queues to consume; None for all that have a handler.
        processes: Child processes; None for one for each CPU.
        concurrency: Handlers at once in each.
        pool: ``processes`` or ``threads``; None for what fits.
        prefetch: Messages in hand at most; None for a number that fits. Brokers share it, and each may always
            have its equal share of it, so with several there may be more for a moment.
        grace: How long handlers may go on after a stop.
        burst: Whether to stop when the queues are empty.
        max_tasks_per_child: Messages after which a child is replaced by a fresh one, as soon as that is ready, so
            it may handle a few more; None for never.
        connect_timeout: How long to try to reach the brokers at the start.
        log_level: For the children's logs.
        log_format: ``text`` or ``json``, likewise.
    """

    queues: Sequence[str] | None = None
    processes: int | None = None
    concurrency: int = 8
    pool: str | None = None
    prefetch: int | None = None
    grace: float = 30.0
    burst: bool = False
    max_tasks_per_child: int | None = None
    connect_timeout: float = CONNECT_TIMEOUT
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        for name in ("processes", "concurrency", "prefetch", "max_tasks_per_child"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise Invalid(f"{name}: expected an integer from 1, got {value!r}")
        if self.pool not in (None, "processes", "threads"):
            raise Invalid(f"pool: expected processes or threads, got {self.pool!r}")
        for name in ("grace", "connect_timeout"):
            object.__setattr__(self, name, limit.seconds(name, getattr(self, name)))
