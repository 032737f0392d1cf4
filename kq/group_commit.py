"""Group commit: threads that publish at the same moment share one round trip.

The first thread to arrive becomes the leader and publishes everything that waits, its own and the
others'; those that arrive meanwhile form the next group. A lone publisher pays nothing for it, and
sixteen threads cost the broker about as much as one. The term and the idea are the databases'.

Where a group takes long, because the broker is far away or somebody publishes very much, the next one does not wait
for its end, if the backend can publish from several threads at once. Where all of them take long, and there are many
ways, it does not wait at all: what it would save is little beside the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Condition, RLock, Thread
from time import monotonic
from typing import Final

from kq.backend import Publication
from kq.errors import Error, Internal
from kq.shield import shielding

Commit = Callable[[Sequence[Publication], float], list[Error | None]]

#: Publications that one group carries at most, so that no thread waits on a crowd's behalf.
MAX_GROUP = 5000

#: Seconds that a group waits for the one before it, while there is another way to go.
_PATIENCE = 0.001
#: Groups under way at once to a broker that is near; where there are more ways than that, nobody waits.
_FEW = 4

#: Seconds after which a group, and each message in it, has taken long.
_LONG = 0.004
_LONG_EACH = 0.0001
#: How much of what a group took beyond the shortest ones is believed: some forty long ones in a row make a broker far,
#: and a short one makes it near. A process that is busy with other things has long ones, too, but not all of them.
_BELIEF = 1 / 64
#: Publications of a group that tells more of the way than of itself.
_SMALL = 50

#: How much of its time a caller must have left to commit in its own thread: what a single call may take at most.
_ENOUGH = 0.9
#: What is wrong with a queue alone.
_OF_A_QUEUE: Final = frozenset({"full", "unroutable"})


def length(seconds: float, size: int) -> float:
    """Return how long so many messages took to be published: less than 1 is not long."""
    return seconds / (_LONG + _LONG_EACH * size)


def late(*, is_taken: bool) -> Internal:
    """Return the error for a message whose caller's time is over; ``is_taken`` once somebody has begun with it."""
    text = (
        "the broker did not confirm in time; the message may arrive"
        if is_taken
        else "what was published before has taken all the time; it was not sent"
    )
    return Internal(text, details={"reason": "timeout"})


class _Ticket:
    """One caller's publications, and what became of them."""

    __slots__ = ("batch", "deadline", "is_taken", "results")

    def __init__(self, batch: Sequence[Publication], deadline: float) -> None:
        self.batch = batch
        self.deadline = deadline
        #: Whether a leader has it.
        self.is_taken = False
        self.results: list[Error | None] | None = None


class GroupCommit:
    """Runs ``commit`` for everybody who waits. Thread-safe.

    Args:
        commit: Publishes; called in as many threads at once as ``most`` says, at most.
        most: Returns how many groups may be under way at once; asked only after something has been published.
        is_prompt: Whether a call of a connected backend ends in the callers' time, or soon after it.
        is_ready: Tells whether a caller's publications need nothing but that, as declaring their queue.
    """

    def __init__(
        self,
        commit: Commit,
        most: Callable[[], int] = lambda: 1,
        *,
        is_prompt: bool = True,
        is_ready: Callable[[Sequence[Publication]], bool] = lambda batch: True,
    ) -> None:
        self._commit = commit
        self._most = most
        self._is_prompt = is_prompt
        self._is_ready = is_ready
        # Entered with each message, so not through the condition, whose way in is Python. A signal's handler may
        # publish as well, in a thread that holds it.
        self._lock = RLock()
        self._turn = Condition(self._lock)
        self._waiting: list[_Ticket] = []
        #: Groups that are being published, by identity: whoever is interrupted may say twice that one is not any more.
        self._under_way: set[int] = set()
        #: Whether the last commit found the broker as it should be.
        self._proven = False
        #: Groups that may be under way at once; 0 as long as nobody knows.
        self._ways = 0
        #: About the shortest time that groups take, as a part of what is long.
        self._distance = 0.0

    @property
    def width(self) -> int:
        """Groups that may be under way at once, as far as one can tell."""
        # A broker that is away is tried by one.
        if not self._proven:
            return 1
        return max(1, self._ways if self._distance > 1 else min(self._ways, _FEW))

    def pause(self, under_way: int, waited: float) -> float | None:
        """Return the seconds until a group may go that has waited for ``waited`` behind others.

        None where one of those has to end before.
        """
        # Nobody waits behind what was sent to a broker that has been found otherwise since: that is for others to see.
        if not under_way or not self._proven:
            return 0.0
        width = self.width
        if under_way >= width:
            return None
        return 0.0 if width > _FEW else max(0.0, _PATIENCE - waited)

    def doubt(self) -> None:
        """Take note that the broker was not as it should be."""
        with self._lock:
            self._proven = False

    def is_ready(self, batch: Sequence[Publication]) -> bool:
        """Tell whether ``batch`` needs nothing but publishing, to a broker that was as it should be the last time."""
        return self._proven and self._is_prompt and self._is_ready(batch)

    def publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        """Publish ``batch`` and return one result for each; blocks at most ``timeout`` seconds."""
        # A handler's time limit must not strike in here: others wait for the lock and the connection.
        shield = shielding()
        if shield is None:
            return self._publish(batch, timeout)
        with shield:
            return self._publish(batch, timeout)

    def _publish(self, batch: Sequence[Publication], timeout: float) -> list[Error | None]:
        try:
            results = self._publish_alone(batch, timeout)
        except BaseException:
            # Also if it was interrupted on its way out: nobody else would ever be alone, or first.
            with self._lock:
                self._under_way.discard(id(batch))
                self._turn.notify_all()
            raise
        if results is not None:
            return results
        ticket = _Ticket(batch, monotonic() + timeout)
        group: list[_Ticket] = []
        try:
            with self._lock:
                self._waiting.append(ticket)
                if not self._wait_for_turn(ticket):
                    return _late(ticket)
                if ticket.results is not None:
                    return ticket.results
                self._take(ticket, group)
                plain = (
                    self._is_prompt
                    and self._proven
                    and ticket.deadline - monotonic() > timeout * _ENOUGH
                    and all(self._is_ready(ticket.batch) for ticket in group)
                )
            if plain:
                # The others go when their own time is over.
                self._lead(group, ticket.deadline)
            else:
                self._lead_aside(group, ticket)
        except BaseException:
            self._let_go(group, ticket)
            raise
        return _late(ticket) if ticket.results is None else ticket.results

    def _wait_for_turn(self, ticket: _Ticket) -> bool:
        """Wait until a caller has its results or is to lead the next group; False if its time is over before."""
        width = self.width
        ahead_at = monotonic() + (_PATIENCE if width <= _FEW else 0.0)
        while ticket.results is None:
            if not ticket.is_taken and not self._under_way:
                # Here and in `_take` nothing comes before that: a signal's handler that publishes has to let others
                # have the lock while it waits, and they are not to take it as well.
                ticket.is_taken = True
                return True
            now = monotonic()
            until = ticket.deadline
            # The first of those who wait looks after the others as well.
            if not ticket.is_taken and self._waiting[0] is ticket and len(self._under_way) < self.width:
                if now >= ahead_at:
                    ticket.is_taken = True
                    return True
                until = min(until, ahead_at)
            if ticket.deadline <= now:
                if ticket in self._waiting:
                    # Also where somebody was interrupted who was about to take it: nobody would ever be alone again.
                    self._waiting.remove(ticket)
                    # Somebody else is the first now.
                    self._turn.notify_all()
                return False
            self._turn.wait(until - now)
        return True

    def _publish_alone(self, batch: Sequence[Publication], timeout: float) -> list[Error | None] | None:
        """Publish where nobody else does; None, with nothing done, where somebody does."""
        mine = proven = False
        try:
            with self._lock:
                if self._under_way or self._waiting or not self.is_ready(batch):
                    return None
                mine = True
                self._under_way.add(id(batch))
            began = monotonic()
            results = self._commit(batch, timeout)
            if not any(results):
                proven = True
                self.learn(monotonic() - began, len(results))
            else:
                proven = not any(map(_is_disorder, results))
        except Error as error:
            results = [error] * len(batch)
            proven = not _is_disorder(error)
        finally:
            if mine:
                with self._lock:
                    self._under_way.discard(id(batch))
                    self._proven = proven
                    if self._waiting:
                        self._turn.notify_all()
        return results

    def _lead_aside(self, group: list[_Ticket], mine: _Ticket) -> None:
        """Commit in a thread of its own, and wait for it no longer than the caller can.

        For where a call may take longer than it should: connecting, finding the broker's address, declaring a queue;
        or where the caller's time is nearly over, and that of the others is not. ``group`` is empty once it is that
        thread's, also where this one is interrupted.
        """
        failure: list[BaseException] = []
        aside = list(group)

        def lead() -> None:
            with self._lock:
                if mine.results is not None:
                    # Whoever was to wait for it has been interrupted before this began, and has let go of it.
                    return
                self._under_way.discard(id(group))
                self._under_way.add(id(aside))
                group.clear()
            try:
                self._lead(aside, max(ticket.deadline for ticket in aside))
            except BaseException as error:
                failure.append(error)
                self._let_go(aside, mine)

        try:
            Thread(target=lead, name="kq-commit", daemon=True).start()
        except (RuntimeError, MemoryError):
            # No room for one more. Then here, however long it takes.
            lead()
        with self._lock:
            self._turn.wait_for(lambda: mine.results is not None or failure, mine.deadline - monotonic())
        if failure:
            raise failure[0]

    def _let_go(self, group: list[_Ticket], mine: _Ticket) -> None:
        """Leave nobody waiting behind a caller that was interrupted, and nothing of its own for others to publish."""
        text = "publishing was interrupted; the message may arrive all the same"
        failed = Internal(text, details={"reason": "unavailable"})
        with self._lock:
            for ticket in (mine, *group):
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
            for ticket in group:
                if ticket.results is None:
                    ticket.results = [failed for _ in ticket.batch]
            self._under_way.discard(id(group))
            self._turn.notify_all()

    def _take(self, mine: _Ticket, group: list[_Ticket]) -> None:
        """Move the next group off the waiting list; the leader's own ticket is always in it.

        Whoever is interrupted leaves each ticket in the one, the other, or both.
        """
        self._under_way.add(id(group))
        group.append(mine)
        self._leave_out(mine)
        size = len(mine.batch)
        for ticket in list(self._waiting):
            if ticket.is_taken:
                continue
            try:
                ticket.is_taken = True
                size += len(ticket.batch)
                if size > MAX_GROUP:
                    ticket.is_taken = False
                    break
                group.append(ticket)
                self._leave_out(ticket)
            except BaseException:
                # Interrupted. What is not in the group is nobody's.
                ticket.is_taken = ticket in group
                raise
        if self._waiting:
            # Somebody else is the first of them now.
            self._turn.notify_all()

    def _leave_out(self, ticket: _Ticket) -> None:
        # Its time may have been over while somebody's signal handler had the lock let go.
        with suppress(ValueError):
            self._waiting.remove(ticket)

    def _lead(self, group: list[_Ticket], deadline: float) -> None:
        batch = [publication for ticket in group for publication in ticket.batch]
        began = monotonic()
        try:
            results = self._commit(batch, max(0.0, deadline - began))
        except Error as error:
            results = [error] * len(batch)
        if not any(results):
            self.learn(monotonic() - began, len(results))
        with self._lock:
            self._proven = not any(map(_is_disorder, results))
            self._deal(group, results)
            self._under_way.discard(id(group))
            self._turn.notify_all()

    def learn(self, took: float, size: int) -> None:
        """Take note of how long a group took that is published. Without the lock: whom it asks has locks as well."""
        if not self._ways:
            with suppress(Error):
                self._ways = self._most()
        if size > _SMALL:
            return
        distance = min(length(took, size), 2.0)
        nearer = distance < self._distance
        self._distance = distance if nearer else self._distance + (distance - self._distance) * _BELIEF

    @staticmethod
    def _deal(group: list[_Ticket], results: list[Error | None]) -> None:
        start = 0
        for ticket in group:
            end = start + len(ticket.batch)
            ticket.results = results[start:end]
            start = end


def _is_disorder(error: Error | None) -> bool:
    """Tell whether an answer says that a broker is not as it should be, for everybody; None says that all is well."""
    return error is not None and error.retryable and error.details.get("reason") not in _OF_A_QUEUE


def _late(ticket: _Ticket) -> list[Error | None]:
    return [late(is_taken=ticket.is_taken) for _ in ticket.batch]
