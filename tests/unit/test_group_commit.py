from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Event, Lock, Semaphore, Thread, current_thread
from typing import cast

import pytest

from kq import errors, group_commit
from kq.backend import Publication, QueueSpec
from kq.envelope import Envelope
from kq.errors import Error
from kq.group_commit import MAX_GROUP, GroupCommit

QUEUE = QueueSpec("app:a")
Results = list[errors.Error | None]


def batch(*ids: str) -> list[Publication]:
    """Publications with these ids."""
    return [Publication(QUEUE, Envelope(id, {}, {}, b"1")) for id in ids]


def test_a_lone_publisher_commits_at_once() -> None:
    """Without others the batch goes out as it is, in the caller's thread, within the caller's time."""
    calls: list[tuple[list[str], float]] = []

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        calls.append(([p.envelope.id for p in group], timeout))
        return [None] * len(group)

    assert GroupCommit(commit).publish(batch("a", "b"), 5.0) == [None, None]
    ((ids, timeout),) = calls
    assert ids == ["a", "b"]
    assert 4.0 < timeout <= 5.0


def test_results_are_dealt_in_order() -> None:
    """Each publication has its own result, in the order of the batch."""
    full = errors.Internal("no", details={"reason": "full"})

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        return [full if p.envelope.id == "bad" else None for p in group]

    assert GroupCommit(commit).publish(batch("a", "bad", "c"), 5.0) == [None, full, None]


def test_an_error_of_kq_is_everybodys_result() -> None:
    """A commit that raises an Error gives it to each publication instead of raising."""
    error = errors.PermissionDenied("no")

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        raise error

    assert GroupCommit(commit).publish(batch("a", "b"), 5.0) == [error, error]


def test_after_an_interrupt_the_next_can_publish() -> None:
    """An interrupt reaches the thread that commits, and leaves nobody locked out."""
    interrupts = [KeyboardInterrupt()]

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        if interrupts:
            raise interrupts.pop()
        return [None] * len(group)

    group = GroupCommit(commit)
    with pytest.raises(KeyboardInterrupt):
        group.publish(batch("a"), 5.0)
    assert group.publish(batch("b"), 5.0) == [None]


def test_a_batch_beyond_the_group_limit_goes_out() -> None:
    """The group's limit does not bind a single caller's batch."""
    sizes: list[int] = []

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        sizes.append(len(group))
        return [None] * len(group)

    publications = batch("a") * (MAX_GROUP + 1)
    assert len(GroupCommit(commit).publish(publications, 5.0)) == MAX_GROUP + 1
    assert sizes == [MAX_GROUP + 1]


def test_threads_share_commits_and_get_their_own_results() -> None:
    """One commit at a time; everything is committed once, and every caller gets its own results."""
    lock = Lock()
    committed: list[str] = []

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        assert lock.acquire(blocking=False), "two commits at once"
        committed.extend(p.envelope.id for p in group)
        results: Results = [errors.Internal(p.envelope.id) if "bad" in p.envelope.id else None for p in group]
        lock.release()
        return results

    group = GroupCommit(commit)

    def publish(number: int) -> bool:
        ids = [f"{number}-ok", f"{number}-bad", f"{number}-end"]
        results = group.publish(batch(*ids), 30.0)
        return [result and result.message for result in results] == [None, f"{number}-bad", None]

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(publish, range(400)))
    assert len(committed) == len(set(committed)) == 1200
    for number in range(400):
        start = committed.index(f"{number}-ok")
        assert committed[start : start + 3] == [f"{number}-ok", f"{number}-bad", f"{number}-end"]


def test_who_waits_too_long_is_late() -> None:
    """Behind a slow commit a caller gets a timeout within its own time, and its batch is not sent later."""
    entered, go_on = Event(), Event()
    committed: list[str] = []

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        committed.extend(p.envelope.id for p in group)
        entered.set()
        assert go_on.wait(30)
        return [None] * len(group)

    group = GroupCommit(commit)
    with ThreadPoolExecutor(1) as threads:
        leader = threads.submit(group.publish, batch("a"), 30.0)
        assert entered.wait(30)
        late = group.publish(batch("b", "c"), 0.01)
        go_on.set()
        assert leader.result() == [None]
    assert [(error.kind, error.retryable, error.details) for error in late if error] == [
        ("INTERNAL", True, {"reason": "timeout"})
    ] * 2
    assert committed == ["a"]
    assert group.publish(batch("d"), 5.0) == [None]
    assert committed == ["a", "d"]


def test_without_room_for_a_thread_it_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first publish goes out in the caller's thread where no other can be started, and so do the next ones."""

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        return [None] * len(group)

    def no_room(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    group = GroupCommit(commit)
    monkeypatch.setattr(Thread, "start", no_room)
    assert group.publish(batch("a"), 5.0) == [None]
    monkeypatch.undo()
    assert group.publish(batch("b"), 5.0) == [None]


def test_an_interrupted_follower_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is interrupted while another one publishes takes its message along: its time is not the next one's."""
    sent: list[tuple[list[str], float]] = []
    began, go_on = Event(), Event()

    def commit(group: Sequence[Publication], timeout: float) -> Results:
        sent.append(([p.envelope.id for p in group], timeout))
        if group[0].envelope.id == "slow":
            began.set()
            assert go_on.wait(20)
        return [None] * len(group)

    def interrupt(*arguments: object) -> bool:
        raise KeyboardInterrupt

    group = GroupCommit(commit)
    assert group.publish(batch("first"), 5.0) == [None]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(group.publish, batch("slow"), 20.0)
        assert began.wait(20)
        with monkeypatch.context() as patched:
            patched.setattr(group._turn, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                group.publish(batch("interrupted"), 5.0)
        go_on.set()
        assert slow.result(20) == [None]
    assert group.publish(batch("last"), 5.0) == [None]
    assert [ids for ids, _ in sent] == [["first"], ["slow"], ["last"]]


def test_who_gives_up_is_waited_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a leader was interrupted who was just about to take it: whoever comes then is alone."""
    began, go_on, waits = Event(), Event(), Event()

    def commit(publications: Sequence[Publication], timeout: float) -> Results:
        if publications[0].envelope.id == "slow":
            began.set()
            assert go_on.wait(20)
        return [None] * len(publications)

    group = GroupCommit(commit)
    assert group.publish(batch("first"), 5.0) == [None]

    def take(timeout: float) -> bool:
        # As a leader has left it that was interrupted after this.
        (ticket,) = group._waiting
        ticket.is_taken = True
        waits.set()
        return Condition.wait(group._turn, timeout)

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(group.publish, batch("slow"), 20.0)
        assert began.wait(20)
        with monkeypatch.context() as patched:
            patched.setattr(group._turn, "wait", take)
            late = pool.submit(group.publish, batch("late"), 0.01)
            assert waits.wait(20)
            (error,) = late.result(20)
        assert error is not None
        assert error.details["reason"] == "timeout"
        assert not group._waiting
        go_on.set()
        assert slow.result(20) == [None]


@pytest.mark.parametrize(("reason", "is_in_order"), [("full", True), ("unroutable", True), ("unavailable", False)])
def test_a_queue_that_refuses_says_nothing_of_the_broker(reason: str, is_in_order: bool) -> None:
    """Others need no thread of their own to publish to it."""

    def commit(publications: Sequence[Publication], timeout: float) -> Results:
        if publications[0].envelope.id == "refused":
            return [errors.Internal("no", details={"reason": reason})]
        return [None] * len(publications)

    group = GroupCommit(commit)
    assert group.publish(batch("first"), 5.0) == [None]
    group.publish(batch("refused"), 5.0)
    assert group._proven == is_in_order


def test_who_is_interrupted_when_all_is_done_leaves_the_way_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the moment in which everybody has results and the one in which the group is not under way."""

    def deal(group: object, results: object) -> None:
        original(group, results)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    original = GroupCommit._deal
    group = GroupCommit(lambda publications, timeout: [None] * len(publications))
    with monkeypatch.context() as patched:
        patched.setattr(group, "_deal", deal)
        with pytest.raises(KeyboardInterrupt):
            group.publish(batch("a"), 5.0)
    assert group.publish(batch("b"), 5.0) == [None]


def test_a_call_that_may_take_long_is_not_waited_for_when_time_is_over() -> None:
    """Where a single call may take longer than its caller has, only the caller goes."""
    began, go_on = Event(), Event()

    def commit(publications: Sequence[Publication], timeout: float) -> Results:
        if publications[0].envelope.id == "slow":
            began.set()
            assert go_on.wait(30)
        return [None] * len(publications)

    group = GroupCommit(commit, is_prompt=False)
    assert group.publish(batch("first"), 5.0) == [None]
    (late,) = group.publish(batch("slow"), 0.05)
    assert late is not None
    assert late.details["reason"] == "timeout"
    assert began.wait(30)
    go_on.set()
    assert group.publish(batch("last"), 30.0) == [None]


class Held:
    """Commits; a group whose first message is ``slow`` or ``away`` waits until `go_on` is set, and ``away`` fails."""

    def __init__(self) -> None:
        self.began, self.go_on = Semaphore(0), Event()
        self.lock = Lock()
        self.under_way = self.most = 0
        self.sent: list[list[str]] = []

    def commit(self, group: Sequence[Publication], timeout: float) -> Results:
        """Commit a group."""
        ids = [publication.envelope.id for publication in group]
        with self.lock:
            self.sent.append(ids)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        if ids[0].startswith(("slow", "away")):
            self.began.release()
            assert self.go_on.wait(30)
        with self.lock:
            self.under_way -= 1
        failed = errors.Internal("gone", details={"reason": "unavailable"})
        return [failed if ids[0].startswith("away") else None] * len(ids)


def test_a_slow_group_holds_nobody_up_where_there_is_another_way() -> None:
    """Who waits behind a group that takes long goes ahead, and takes all others along that wait."""
    held = Held()
    group = GroupCommit(held.commit, lambda: 2)
    assert group.publish(batch("first"), 5.0) == [None]
    with ThreadPoolExecutor(9) as threads:
        slow = threads.submit(group.publish, batch("slow"), 30.0)
        assert held.began.acquire(timeout=30)
        assert list(threads.map(lambda n: group.publish(batch(f"{n}"), 30.0), range(100))) == [[None]] * 100
        assert not slow.done()
        held.go_on.set()
        assert slow.result(30) == [None]
    assert sorted(id for ids in held.sent[2:] for id in ids) == sorted(map(str, range(100)))


def test_no_more_groups_are_under_way_than_there_are_ways() -> None:
    """Where all ways are taken the others wait, and form a group when the first of them is free."""
    held = Held()
    group = GroupCommit(held.commit, lambda: 2)
    assert group.publish(batch("first"), 5.0) == [None]
    with ThreadPoolExecutor(6) as threads:
        slow = [threads.submit(group.publish, batch(f"slow{n}"), 30.0) for n in range(2)]
        for _ in slow:
            assert held.began.acquire(timeout=30)
        assert all(group.publish(batch("late"), 0.05))
        rest = [threads.submit(group.publish, batch(f"{n}"), 30.0) for n in range(4)]
        held.go_on.set()
        assert [future.result(30) for future in (*slow, *rest)] == [[None]] * 6
    assert held.most == 2
    assert "late" not in [id for ids in held.sent for id in ids]


def test_to_a_broker_that_is_near_few_groups_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ways there are: to share a trip is better there than to have one each."""
    monkeypatch.setattr(group_commit, "_LONG", 60.0)
    held = Held()
    group = GroupCommit(held.commit, lambda: 16)
    assert group.publish(batch("first"), 5.0) == [None]
    with ThreadPoolExecutor(20) as threads:
        slow = []
        for n in range(4):
            # One after the other: those who wait together go together.
            slow.append(threads.submit(group.publish, batch(f"slow{n}"), 30.0))
            assert held.began.acquire(timeout=30)
        slow += [threads.submit(group.publish, batch(f"slow{n}"), 30.0) for n in range(4, 20)]
        assert all(group.publish(batch("late"), 0.05))
        held.go_on.set()
        assert [future.result(30) for future in slow] == [[None]] * 20
    assert held.most == group.width == 4


def test_to_a_broker_that_is_far_nobody_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every trip takes long each goes its own way, as long as there is one; it ends with one that does not."""
    monkeypatch.setattr(group_commit, "_LONG", 1e-9)
    monkeypatch.setattr(group_commit, "_LONG_EACH", 0.0)
    monkeypatch.setattr(group_commit, "_PATIENCE", 60.0)
    held = Held()
    group = GroupCommit(held.commit, lambda: 16)
    for n in range(40):
        assert group.publish(batch(f"{n}"), 5.0) == [None]
        assert group.width == 4
    # A crowd, or a refusal, says nothing of the way.
    monkeypatch.setattr(group_commit, "_LONG", 60.0)
    assert group.publish(batch(*map(str, range(100))), 5.0) == [None] * 100
    held.go_on.set()
    assert all(group.publish(batch("away"), 5.0))
    held.go_on.clear()
    assert held.began.acquire(timeout=30)
    monkeypatch.setattr(group_commit, "_LONG", 1e-9)
    for n in range(5):
        assert group.publish(batch(f"{n}"), 5.0) == [None]
    assert group.width == 16
    with ThreadPoolExecutor(16) as threads:
        slow = [threads.submit(group.publish, batch(f"slow{n}"), 30.0) for n in range(16)]
        for _ in slow:
            assert held.began.acquire(timeout=30)
        held.go_on.set()
        assert [future.result(30) for future in slow] == [[None]] * 16
    assert held.most == group.width == 16
    monkeypatch.setattr(group_commit, "_LONG", 60.0)
    assert group.publish(batch("quick"), 5.0) == [None]
    assert group.width == 4


def test_when_the_first_of_those_who_wait_gives_up_the_next_goes_ahead() -> None:
    """Somebody always looks after those who wait, as long as there is a way."""
    began = {name: Event() for name in ("first", "one", "two", "behind")}
    go_on = {name: Event() for name in began}
    go_on["first"].set()

    def commit(publications: Sequence[Publication], timeout: float) -> Results:
        name = publications[0].envelope.id
        began[name].set()
        assert go_on[name].wait(30)
        return [None] * len(publications)

    group = GroupCommit(commit, lambda: 2)
    with ThreadPoolExecutor(4) as threads:
        assert group.publish(batch("first"), 30.0) == [None]
        slow = []
        for name in ("one", "two"):
            slow.append(threads.submit(group.publish, batch(name), 30.0))
            assert began[name].wait(30)
        early = threads.submit(group.publish, batch("early"), 0.2)
        while not group._waiting and not early.done():
            pass
        behind = threads.submit(group.publish, batch("behind"), 30.0)
        assert all(early.result(30))
        go_on["one"].set()
        assert began["behind"].wait(10)
        assert not slow[1].done()
        for event in go_on.values():
            event.set()
        assert [future.result(30) for future in (*slow, behind)] == [[None]] * 3


def test_a_broker_that_is_away_is_tried_by_one() -> None:
    """After a failure groups go one after the other again, however many ways there are."""
    held = Held()
    group = GroupCommit(held.commit, lambda: 4)
    held.go_on.set()
    assert all(group.publish(batch("away"), 5.0))
    assert group.width == 1
    held.go_on.clear()
    assert held.began.acquire(timeout=30)
    with ThreadPoolExecutor(1) as threads:
        again = threads.submit(group.publish, batch("away again"), 30.0)
        assert held.began.acquire(timeout=30)
        assert all(group.publish(batch("b"), 0.05))
        held.go_on.set()
        assert all(again.result(30))
    assert held.sent == [["away"], ["away again"]]


def test_a_signals_handler_publishes_in_the_middle_of_a_publish() -> None:
    """What interrupts a publish, in its own thread, goes another way."""
    group: GroupCommit

    def commit(publications: Sequence[Publication], timeout: float) -> Results:
        if publications[0].envelope.id == "interrupted":
            assert group.publish(batch("handler"), 10.0) == [None]
        return [None] * len(publications)

    group = GroupCommit(commit, lambda: 2)
    assert group.publish(batch("first"), 5.0) == [None]
    assert group.publish(batch("interrupted"), 5.0) == [None]


def test_who_is_interrupted_on_the_way_out_leaves_nobody_behind() -> None:
    """As by a signal's handler that raises in the last moment: the next one is alone again."""

    class Interrupting(set[int]):
        def discard(self, number: object) -> None:
            if interrupts:
                raise interrupts.pop()
            super().discard(cast(int, number))

    interrupts: list[BaseException] = []
    group = GroupCommit(lambda publications, timeout: [None] * len(publications))
    assert group.publish(batch("first"), 5.0) == [None]
    group._under_way = Interrupting()
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        group.publish(batch("a"), 5.0)

    assert not group._under_way
    assert group.publish(batch("b"), 5.0) == [None]


def test_what_is_not_ready_does_not_hold_its_caller_up() -> None:
    """To declare a queue may take longer than the caller has."""
    ready = True
    threads: list[Thread] = []

    def commit(publications: Sequence[Publication], timeout: float) -> list[Error | None]:
        threads.append(current_thread())
        return [None] * len(publications)

    group = GroupCommit(commit, is_ready=lambda publications: ready)
    group.publish(batch("first"), 5.0)
    group.publish(batch("known"), 5.0)
    ready = False
    group.publish(batch("new"), 5.0)

    assert [thread is current_thread() for thread in threads] == [False, True, False]
