"""Publishing from an event loop itself, to a broker at the other end of a socket."""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from time import monotonic
from typing import Any

import pytest

from kq import errors, group_commit, loop_commit
from kq.async_commit import AsyncCommit
from kq.backend import SEND_BYTES, SEND_LONG, SEND_MOST, Publication, QueueSpec, Unconfirmed
from kq.envelope import Envelope
from kq.group_commit import GroupCommit
from kq.shield import HandlerTimeout, Shield, carry

Results = list[errors.Error | None]


def batch(*ids: str, queue: str = "app:a", bodies: Sequence[bytes] = ()) -> list[Publication]:
    """Publications with these ids."""
    pairs = zip(ids, bodies or [b"1"] * len(ids), strict=True)
    return [Publication(QueueSpec(queue), Envelope(id, {}, {}, body)) for id, body in pairs]


#: An answer that is told to whoever waits, instead of publishing the message once more.
BLOCKED = errors.Internal("the broker takes nothing now", details={"reason": "blocked"})


class Sent:
    """A group on its way: the broker answers with a byte for each message.

    1 where it is stored, 0 where it is not, and 2 where it says what is wrong.
    """

    timeout = 60.0

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self.way: object = self
        self.is_begun = False
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.is_closed = False
        #: How many calls there is no room for.
        self.blocked = 0
        self.is_whole = asyncio.Event()
        #: Called in the middle of reading it.
        self.on_answer: Callable[[], None] | None = None
        #: Called once it has been sent.
        self.on_whole: Callable[[], None] | None = None
        self._answer = b""

    def fileno(self) -> int:
        return self.ours.fileno()

    def late(self) -> errors.Error:
        return errors.Internal("the broker is mute", details={"reason": "timeout"})

    def write(self) -> bool:
        self.is_begun = True
        if self.blocked:
            self.blocked -= 1
            return False
        self.is_whole.set()
        if self.on_whole is not None:
            self.on_whole()
            self.on_whole = None
        return True

    def confirm(self) -> list[bool | errors.Error] | None:
        try:
            data = self.ours.recv(1000)
            if not data:
                return [False] * len(self.ids)
            self._answer += data
        except BlockingIOError:
            pass
        if self.on_answer is not None:
            self.on_answer()
        if len(self._answer) < len(self.ids):
            return None
        return [BLOCKED if byte == 2 else byte == 1 for byte in self._answer]

    def known(self) -> list[bool | None]:
        return [*(byte == 1 for byte in self._answer), *[None] * (len(self.ids) - len(self._answer))]

    def close(self) -> None:
        self.is_closed = True
        self.ours.close()
        self.theirs.close()

    def answer(self, *stored: bool | int) -> None:
        """Have it answered, or the first of it."""
        self.theirs.sendall(bytes(stored or [True] * len(self.ids)))


class Broker:
    """Notes what loops send, and what threads publish."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.published: list[list[str]] = []
        #: What sending comes to instead, one for each call, and calls to write more than there is room for.
        self.refusals: list[Exception | None] = []
        self.blocked = 0
        self._has_more = asyncio.Event()
        self.is_ready = True
        #: Whether it answers at once.
        self.answers = False
        group = GroupCommit(self.commit, lambda: self.width, is_ready=lambda batch: self.is_ready)
        self.width = 1
        assert group.publish(batch("first"), 5.0) == [None]
        self.published.clear()
        self.group = group
        self.tasks = AsyncCommit(group, lambda: self.send)

    def commit(self, batch: Sequence[Publication], timeout: float) -> Results:
        self.published.append([publication.envelope.id for publication in batch])
        return [None] * len(batch)

    def send(self, batch: Sequence[Publication]) -> Unconfirmed | None:
        if self.refusals:
            refusal = self.refusals.pop()
            if refusal is not None:
                raise refusal
            return None
        sent = Sent([publication.envelope.id for publication in batch])
        sent.blocked = self.blocked
        self.sent.append(sent)
        self._has_more.set()
        if self.answers:
            sent.answer()
        return sent

    async def has_sent(self, number: int) -> None:
        """Wait until so many groups have been sent."""
        while len(self.sent) < number:
            self._has_more.clear()
            await self._has_more.wait()

    def answer(self, number: int) -> None:
        """Have a group stored."""
        self.sent[number].answer()

    @property
    def groups(self) -> list[list[str]]:
        """The ids that have been sent, group by group."""
        return [sent.ids for sent in self.sent]

    def publish(
        self, *ids: str, timeout: float = 30.0, queue: str = "app:a", bodies: Sequence[bytes] = ()
    ) -> asyncio.Task[Results]:
        """Have a task publish messages."""
        return asyncio.ensure_future(self.tasks.publish(batch(*ids, queue=queue, bodies=bodies), timeout))

    def has_threads(self) -> bool:
        """Tell whether any were started for tasks."""
        return bool(self.tasks._threads)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """One with the last publish of which all was well."""
    # A machine that stands still for a while is no interrupt.
    monkeypatch.setattr(loop_commit, "_GATHERS", 60.0)
    made = Broker()
    yield made
    for sent in made.sent:
        # What has not been answered never is.
        sent.theirs.close()
    made.tasks.close(20)
    for sent in made.sent:
        sent.close()


async def turn() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_lone_task_needs_no_thread(broker: Broker) -> None:
    """Its message is sent when it publishes, and it goes on when the broker has stored it, not before."""

    async def main() -> None:
        for n in range(3):
            task = broker.publish(f"{n}")
            await turn()
            assert broker.groups == [[f"{m}"] for m in range(n + 1)]
            assert not task.done()
            broker.sent[-1].answer()
            assert await task == [None]
            assert broker.sent[-1].is_closed

    asyncio.run(main())
    assert not broker.has_threads()
    assert broker.published == []


def test_what_comes_meanwhile_goes_together(broker: Broker) -> None:
    """In order, with what those publish next who have been confirmed, and again without a thread."""

    async def twice(id: str) -> None:
        assert await broker.tasks.publish(batch(f"{id}1"), 30.0) == [None]
        assert await broker.tasks.publish(batch(f"{id}2", f"{id}3"), 30.0) == [None, None]

    async def main() -> None:
        tasks = [asyncio.ensure_future(twice(id)) for id in "abc"]
        await turn()
        assert broker.groups == [["a1"]]
        broker.sent[0].answer()
        await broker.has_sent(2)
        # Whoever was confirmed has had its turn.
        assert broker.groups[1] == ["b1", "c1", "a2", "a3"]
        broker.sent[1].answer()
        await broker.has_sent(3)
        assert broker.groups[2] == ["b2", "b3", "c2", "c3"]
        broker.sent[2].answer()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert not broker.has_threads()


def test_those_of_a_queue_go_one_after_the_other(broker: Broker) -> None:
    """A group has what is for the same queue together, in its order, and each task its own results."""

    async def main() -> None:
        first = broker.publish("first")
        await turn()
        others = [broker.publish(f"{q}{n}", queue=f"app:{q}") for n in range(2) for q in "zx"]
        await turn()
        broker.sent[0].answer()
        await first
        await broker.has_sent(2)
        assert broker.groups[1] == ["x0", "x1", "z0", "z1"]
        broker.sent[1].answer(True, True, False, True)
        assert await asyncio.gather(*others) == [[None]] * 4

    asyncio.run(main())
    assert broker.published == [["z0"]]


def test_what_is_not_stored_is_published(broker: Broker) -> None:
    """By a thread, under its id, and nothing else of its group: that is stored."""

    async def main() -> None:
        first = broker.publish("first")
        await turn()
        others = [broker.publish(id) for id in "abc"]
        await turn()
        broker.sent[0].answer(False)
        assert await first == [None]
        await broker.has_sent(2)
        broker.sent[1].answer(True, False, True)
        assert await asyncio.gather(*others) == [[None]] * 3

    asyncio.run(main())
    assert broker.published == [["first"], ["b"]]


def test_some_of_what_a_task_publishes_is_not_stored(broker: Broker) -> None:
    """The rest of it is not published once more: not every broker knows a message again by its id."""

    async def main() -> None:
        task = broker.publish("a", "b", "c", "d")
        await turn()
        broker.sent[0].answer(1, 0, 2, 0)
        assert await task == [None, None, BLOCKED, None]

    asyncio.run(main())
    assert broker.published == [["b", "d"]]


def test_what_is_wrong_with_a_broker_is_told_at_once(broker: Broker) -> None:
    """Whoever comes next is for a thread to see to, which finds out whether it is so still."""

    async def main() -> None:
        tasks = [broker.publish("a", "b")]
        await turn()
        broker.sent[0].answer(2, 1)
        assert await asyncio.gather(*tasks) == [[BLOCKED, None]]
        assert await broker.publish("next") == [None]
        broker.answers = True
        assert await broker.publish("last") == [None]

    asyncio.run(main())
    assert (broker.published, broker.groups) == ([["next"]], [["a", "b"], ["last"]])


@pytest.mark.parametrize("refusal", [None, errors.Internal("closed"), MemoryError(), OSError("no descriptor")])
def test_what_cannot_be_sent_is_published(broker: Broker, refusal: Exception | None) -> None:
    """As where there is no connection yet, or it is too long, or whatever goes wrong; the next one is sent again."""
    broker.refusals = [refusal]
    broker.answers = True

    async def main() -> None:
        assert await broker.publish("a") == [None]
        assert await broker.publish("b") == [None]

    asyncio.run(main())
    assert (broker.published, broker.groups) == ([["a"]], [["b"]])


def test_a_queue_that_is_not_declared_is_left_to_threads(broker: Broker) -> None:
    """So is a broker that the last publish did not find as it should be."""
    broker.answers = True
    broker.is_ready = False

    async def main() -> None:
        assert await broker.publish("a") == [None]
        broker.is_ready = True
        broker.group._proven = False
        assert await broker.publish("b") == [None]
        # By then it is.
        assert await broker.publish("c") == [None]

    asyncio.run(main())
    assert (broker.published, broker.groups) == ([["a"], ["b"]], [["c"]])


def test_who_waits_too_long_is_late(broker: Broker) -> None:
    """Each task at its own time, with what became of its message; what is never answered holds up nobody for ever."""

    async def main() -> list[Results]:
        slow, other = broker.publish("slow", timeout=0.05), broker.publish("other", timeout=0.02)
        found = [await other, await slow]
        assert broker.sent[0].is_closed
        broker.answers = True
        assert await broker.publish("next") == [None]
        return found

    late, slow = asyncio.run(main())
    assert [str(error) for error in late] == [str(group_commit.late(is_taken=False))]
    assert [str(error) for error in slow] == [str(group_commit.late(is_taken=True))]
    # A broker that does not answer is left to threads.
    assert (broker.groups, broker.published) == ([["slow"]], [["next"]])


def test_who_is_canceled_holds_nobody_up(broker: Broker) -> None:
    """What nobody has begun with is not sent; what is on its way is waited for all the same."""

    async def main() -> None:
        sent, waiting, kept = (broker.publish(id) for id in ("sent", "waiting", "kept"))
        await turn()
        for task in (sent, waiting):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not broker.sent[0].is_closed
        broker.answers = True
        broker.sent[0].answer()
        assert await kept == [None]
        assert broker.sent[0].is_closed

    asyncio.run(main())
    assert broker.groups == [["sent"], ["kept"]]


def test_a_slow_answer_holds_up_nobody_else(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the broker takes several groups at once, another one is sent once the last has been out for a while."""
    broker.width = 2
    # Asked only after something has been published.
    broker.group._ways = 2
    monkeypatch.setattr(group_commit, "_PATIENCE", 3600.0)

    async def main() -> None:
        slow, other = broker.publish("slow"), broker.publish("other")
        await turn()
        assert broker.groups == [["slow"]]
        monkeypatch.setattr(group_commit, "_PATIENCE", 0.0)
        third, fourth = broker.publish("third"), broker.publish("fourth")
        await turn()
        assert broker.groups == [["slow"], ["other", "third"]]
        broker.answers = True
        broker.sent[1].answer()
        assert [await task for task in (other, third, fourth)] == [[None]] * 3
        assert not slow.done()
        broker.sent[0].answer()
        assert await slow == [None]

    asyncio.run(main())


def test_what_there_is_no_room_for_is_sent_when_there_is(broker: Broker) -> None:
    """The loop goes on meanwhile."""
    broker.blocked = 3

    async def main() -> None:
        task = broker.publish("a")
        await broker.has_sent(1)
        await broker.sent[0].is_whole.wait()
        broker.sent[0].answer()
        assert await task == [None]

    asyncio.run(main())


class WithoutReaders(asyncio.SelectorEventLoop):
    """As the loops of Windows, which do not tell of descriptors."""

    def add_reader(self, *args: Any) -> None:  # type: ignore[override]
        raise NotImplementedError


def test_a_loop_without_readers_leaves_it_to_threads(broker: Broker) -> None:
    """Nothing is sent, so nothing is published twice, and it is not asked again."""

    async def main() -> None:
        assert await broker.publish("a") == [None]
        assert not broker.sent[0].is_begun
        assert broker.sent[0].is_closed
        assert await broker.publish("b") == [None]

    loop = WithoutReaders(selectors.DefaultSelector())
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert (broker.groups, broker.published) == ([["a"]], [["a"], ["b"]])


def test_closing_waits_for_what_is_on_its_way(broker: Broker) -> None:
    """Where the loop stands still meanwhile: what is not stored, and what waits behind it, a thread publishes."""

    async def main() -> None:
        tasks = [broker.publish(id) for id in ("sent", "waiting", "canceled")]
        await turn()
        tasks[2].cancel()
        broker.sent[0].answer(False)
        await asyncio.sleep(0)
        broker.tasks.close(20)
        assert sorted(id for ids in broker.published for id in ids) == ["sent", "waiting"]
        assert await asyncio.gather(*tasks[:2]) == [[None], [None]]

    asyncio.run(main())
    assert broker.groups == [["sent"]]


def test_closing_waits_no_longer_than_it_may(broker: Broker) -> None:
    """A broker that does not answer keeps nobody from closing; what waits behind it a thread publishes meanwhile."""

    async def main() -> None:
        broker.publish("mute")
        await turn()
        behind = broker.publish("behind")
        await turn()
        began = monotonic()
        broker.tasks.close(0.5)
        assert 0.5 <= monotonic() - began < 15
        assert await behind == [None]

    asyncio.run(main())
    assert broker.published == [["behind"]]


def test_closing_sends_what_there_was_no_room_for(broker: Broker) -> None:
    """To its end, and waits for the answer."""
    broker.blocked = 3

    async def main() -> None:
        task = broker.publish("a")
        await broker.has_sent(1)
        broker.sent[0].on_whole = broker.sent[0].answer
        assert broker.sent[0].blocked
        broker.tasks.close(20)
        assert broker.sent[0].is_closed
        assert await task == [None]

    asyncio.run(main())
    assert broker.published == []


def test_closing_gives_up_what_has_no_time_left(broker: Broker) -> None:
    """As what a loop that is closed has left behind: nobody waits for it."""

    async def leave() -> None:
        broker.publish("mute", timeout=0.2)
        await turn()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    began = monotonic()
    broker.tasks.close(20)
    assert monotonic() - began < 15
    assert broker.sent[0].is_closed


def test_a_loop_that_stops_is_not_waited_for(broker: Broker) -> None:
    """By whoever closes in another thread: what it has left behind is seen to there."""
    loop = asyncio.new_event_loop()
    running, go_on = Event(), Event()

    async def leave() -> None:
        broker.publish("a")
        await turn()
        running.set()
        await asyncio.to_thread(go_on.wait, 30)

    with ThreadPoolExecutor(2) as threads:
        leaving = threads.submit(loop.run_until_complete, leave())
        assert running.wait(30)
        closing = threads.submit(broker.tasks.close, 20.0)
        assert not closing.done()
        go_on.set()
        leaving.result(30)
        began = monotonic()
        broker.sent[0].answer()
        closing.result(30)
        assert monotonic() - began < 15
    assert broker.sent[0].is_closed
    loop.close()


def test_a_loop_that_has_ended_is_no_harm(broker: Broker) -> None:
    """What was on its way is given up with the loop, in the same thread another one goes on, and closing ends."""

    async def leave() -> None:
        broker.publish("left")
        await turn()

    async def main() -> None:
        broker.answers = True
        assert await broker.publish("next") == [None]

    asyncio.run(leave())
    broker.sent[0].answer()
    broker.tasks.close(20)
    asyncio.run(main())
    assert broker.groups == [["left"], ["next"]]


def test_loops_of_several_threads_do_not_wait_for_each_other(broker: Broker) -> None:
    """Each sends what its own tasks have; to close in one thread leaves the others' loops alone."""

    async def other() -> None:
        task = broker.publish("other")
        await turn()
        broker.sent[1].answer()
        assert await task == [None]

    async def main() -> None:
        task = broker.publish("main")
        await turn()
        thread = Thread(target=lambda: asyncio.run(other()))
        thread.start()
        thread.join(30)
        assert broker.groups == [["main"], ["other"]]
        broker.sent[0].answer()
        assert await task == [None]

    asyncio.run(main())
    assert not broker.has_threads()


def test_a_time_limit_strikes_in_the_task(broker: Broker) -> None:
    """Not in a callback of the loop's, which would log it and go on: where the task goes on that has published."""
    shield = Shield()

    def strike() -> None:
        # What the watchdog does when the time is over in the middle of this.
        assert shield.depth
        shield.is_due = True

    async def main() -> None:
        task = broker.publish("a")
        await turn()
        broker.sent[0].on_answer = strike
        broker.sent[0].answer()
        with pytest.raises(HandlerTimeout):
            await task
        assert (shield.depth, shield.is_due) == (0, False)
        assert broker.sent[0].is_closed

    def run() -> None:
        carry(shield)
        asyncio.run(main())
        done.append(True)

    done: list[bool] = []
    thread = Thread(target=run)
    thread.start()
    thread.join(30)
    assert done


def test_whoever_waits_does_so_only_for_a_while(broker: Broker) -> None:
    """Behind what is not answered, too, and behind what was sent after that: nobody else has to come along."""
    broker.group._ways = 3

    async def main() -> None:
        mute = [broker.publish("mute"), broker.publish("other")]
        await broker.has_sent(2)
        assert broker.groups == [["mute"], ["other"]]
        # Whether these go together or not, which depends on how long the machine takes for what is written here.
        broker.answers = True
        behind = broker.publish("behind"), broker.publish("and it")
        broker.sent[1].answer()
        assert [await task for task in behind] == [[None], [None]]
        assert not mute[0].done()
        broker.sent[0].answer()
        await asyncio.gather(*mute)

    asyncio.run(main())
    assert not broker.has_threads()


def test_a_call_takes_no_longer_than_it_may(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks are told by the backend, before their own time is over; a thread finds out what is the matter."""
    monkeypatch.setattr(Sent, "timeout", 0.02)

    async def main() -> None:
        found = await asyncio.gather(*(broker.publish(id) for id in ("mute", "behind")))
        assert [[str(error) for error in results] for results in found] == [["the broker is mute"], ["None"]]
        # It was as it should be then.
        broker.answers = True
        assert await broker.publish("next") == [None]

    asyncio.run(main())
    assert broker.published == [["behind"]]
    assert broker.groups == [["mute"], ["next"]]


def test_what_is_known_when_the_time_is_over_is_told(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that answers one queue's messages, and not another's, holds up nobody but those; of one task, too."""

    async def main() -> None:
        first = broker.publish("first")
        await turn()
        tasks = [broker.publish("stored", "too"), broker.publish("stored, and refused", "mute")]
        await turn()
        monkeypatch.setattr(Sent, "timeout", 0.05)
        broker.answer(0)
        await first
        await broker.has_sent(2)
        broker.sent[1].answer(1, 1, 1)
        (stored, other) = await asyncio.gather(*tasks)
        assert stored == [None, None]
        assert [str(error) for error in other] == ["None", "the broker is mute"]

    asyncio.run(main())
    assert broker.published == []


def test_the_rest_of_what_is_stored_in_part_may_fail(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is told as stored, also where no thread can be had for the rest."""
    no_room = errors.Internal("no room for a thread")

    async def main() -> None:
        task = broker.publish("a", "b")
        await turn()
        monkeypatch.setattr(broker.tasks._mine.commit, "_pass_on", lambda request: request.tell(no_room))
        broker.sent[0].answer(1, 0)
        assert await task == [None, no_room]

    asyncio.run(main())


def test_groups_are_no_larger_than_they_may(broker: Broker) -> None:
    """What would make one too large begins the next; what is too large by itself is left to threads."""
    long, much = b"1" * SEND_LONG, [b"1" * 1000] * (SEND_BYTES // 1000)

    async def main() -> None:
        tasks = [broker.publish("first")]
        await turn()
        tasks += [broker.publish(*(f"{n}-{m}" for m in range(SEND_MOST // 2 - 1))) for n in range(3)]
        tasks += [broker.publish(f"long-{n}", bodies=[long]) for n in range(SEND_BYTES // SEND_LONG + 1)]
        tasks += [broker.publish(*(f"many-{m}" for m in range(SEND_MOST + 1)))]
        tasks += [
            broker.publish("larger", bodies=[long + b"1"]),
            broker.publish("and", "it", bodies=[b"1", long + b"1"]),
        ]
        tasks += [broker.publish(*(f"much-{n}" for n in range(len(much) + 1)), bodies=[*much, b"1" * 1000])]
        await turn()
        broker.answers = True
        broker.sent[0].answer()
        assert not any([any(await task) for task in tasks])

    asyncio.run(main())
    assert [len(ids) for ids in broker.groups] == [1, SEND_MOST - 2, SEND_MOST // 2 - 1 + 15, 2]
    published = {id.partition("-")[0] for ids in broker.published for id in ids}
    assert published == {"and", "it", "larger", "many", "much"}


def test_a_signals_handler_closes_when_that_is_done(broker: Broker) -> None:
    """Not in the middle of reading an answer, which it would wait for."""

    async def main() -> None:
        tasks = broker.publish("a"), broker.publish("b")
        await turn()
        # As Python runs a handler: in the middle of what the main thread does.
        broker.sent[0].on_answer = lambda: broker.tasks.close(20)
        broker.sent[0].answer()
        began = monotonic()
        assert [await task for task in tasks] == [[None], [None]]
        assert monotonic() - began < 15

    asyncio.run(main())
    assert (broker.groups, broker.published) == ([["a"]], [["b"]])


def test_what_was_read_and_not_ended_is_ended_by_closing(broker: Broker) -> None:
    """Where an interrupt came in between."""

    async def main() -> None:
        task = broker.publish("a")
        await turn()

        def interrupt() -> None:
            broker.sent[0].on_answer = None
            raise ZeroDivisionError

        broker.sent[0].on_answer = interrupt
        broker.sent[0].answer()
        raised = list[Any]()
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context["exception"]))
        await turn()
        assert [type(error) for error in raised] == [ZeroDivisionError]
        assert not task.done()
        began = monotonic()
        broker.tasks.close(20)
        assert monotonic() - began < 15
        assert await task == [None]

    asyncio.run(main())


def test_closing_in_another_thread_waits_as_well(broker: Broker) -> None:
    """For what the loop of this one looks after, while it goes on."""

    async def main() -> None:
        task = broker.publish("a")
        await turn()
        closing = asyncio.get_running_loop().run_in_executor(None, broker.tasks.close, 20.0)
        done, _ = await asyncio.wait([closing], timeout=0.1)
        assert not done
        broker.sent[0].answer()
        await closing
        assert await task == [None]

    asyncio.run(main())


def test_what_a_task_has_forked_leaves_alone_what_is_on_its_way(broker: Broker) -> None:
    """It shares the descriptors, and would take the parent's answer."""

    async def main() -> None:
        task = broker.publish("a")
        await turn()
        broker.sent[0].answer()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(broker.tasks, "_pid", -1)
            await turn()
            assert not task.done()
        assert await task == [None]

    asyncio.run(main())


def test_nobody_waits_behind_a_broker_that_is_doubted(broker: Broker) -> None:
    """What comes after a publish that went wrong is a thread's, though something is on its way: that finds out."""

    async def main() -> None:
        mute, waiting = broker.publish("mute"), broker.publish("waiting")
        await turn()
        broker.group.doubt()
        assert [await broker.publish("next"), await waiting] == [[None], [None]]
        # And then it is as it should be.
        broker.sent[0].answer()
        broker.answers = True
        assert [await mute, await broker.publish("last")] == [[None], [None]]

    asyncio.run(main())
    assert sorted(id for ids in broker.published for id in ids) == ["next", "waiting"]
    assert broker.groups == [["mute"], ["last"]]


def test_a_task_is_told_in_time_whatever_becomes_of_its_group(broker: Broker) -> None:
    """Where no step of the loop's is run any more that would end it, as in a process that the task has forked."""

    async def main() -> Results:
        task = broker.publish("a", timeout=0.05)
        await turn()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(broker.tasks, "_pid", -1)
            return await asyncio.wait_for(task, 30)

    (error,) = asyncio.run(main())
    assert str(error) == str(group_commit.late(is_taken=True))


def test_who_was_to_go_on_and_did_not_holds_nobody_up(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an interrupt strikes in the loop before that has begun: the next one takes what waits with it."""
    monkeypatch.setattr(loop_commit, "_GATHERS", 0.0)

    async def main() -> None:
        first = broker.publish("first")
        await turn()
        waiting = [broker.publish(id) for id in "ab"]
        await turn()
        ours = broker.tasks._pid
        # From here on no step is run, as after a fork.
        broker.sent[0].on_answer = lambda: setattr(broker.tasks, "_pid", -1)
        broker.sent[0].answer()
        assert await first == [None]
        await turn()
        broker.tasks._pid = ours
        assert broker.groups == [["first"]]
        broker.answers = True
        assert await broker.publish("next") == [None]
        assert await asyncio.gather(*waiting) == [[None], [None]]

    asyncio.run(main())
    assert broker.groups == [["first"], ["a", "b", "next"]]
    assert not broker.has_threads()


class Line:
    """A connection over which one group goes after another, as with a broker's."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.is_busy = False

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


class Over(Sent):
    """A group that goes over a connection that stays."""

    def __init__(self, ids: list[str], line: Line) -> None:
        super().__init__(ids)
        self.ours.close()
        self.theirs.close()
        self.ours, self.theirs, self.way = line.ours, line.theirs, line
        self._line = line
        assert not line.is_busy
        line.is_busy = True

    def close(self) -> None:
        self.is_closed = True
        self._line.is_busy = False


class Watching(asyncio.SelectorEventLoop):
    """A loop that counts how often it is told of descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[int] = []
        self.removed: list[int] = []

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        self.added.append(fd)
        super().add_reader(fd, callback, *args)

    def remove_reader(self, fd: Any) -> bool:
        self.removed.append(fd)
        return super().remove_reader(fd)


@pytest.fixture
def lines(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Line]]:
    """Connections, of which the last that is free is taken."""
    made = [Line(), Line()]

    def send(batch: Sequence[Publication]) -> Unconfirmed | None:
        free = [line for line in made if not line.is_busy]
        if not free:
            return None
        broker.sent.append(Over([publication.envelope.id for publication in batch], free[-1]))
        return broker.sent[-1]

    monkeypatch.setattr(broker, "send", send)
    yield made
    for line in made:
        line.close()


def test_a_task_that_goes_on_publishing_is_watched_for_once(broker: Broker, lines: list[Line]) -> None:
    """The loop goes on watching the connection that is used next; when it is used no more, nobody has it."""
    loop = Watching()

    async def publish(count: int) -> None:
        for n in range(count):
            task = asyncio.ensure_future(broker.tasks.publish(batch(f"{n}"), 30.0))
            await turn()
            broker.sent[-1].answer()
            assert await task == [None]

    async def in_a_row(count: int) -> None:
        before = len(broker.sent)
        for n in range(count):
            loop.call_soon(broker.answer, before + n)
            assert await broker.tasks.publish(batch(f"{n}"), 30.0) == [None]

    async def main() -> None:
        await in_a_row(5)
        await turn()
        assert (len(loop.added), len(loop.removed)) == (1, 1)
        assert not any(line.is_busy for line in lines)
        # Who does something else in between gives it up.
        await publish(2)
        await turn()
        assert (len(loop.added), len(loop.removed)) == (3, 3)
        assert not any(line.is_busy for line in lines)

    try:
        loop.run_until_complete(main())
        assert not broker.has_threads()
    finally:
        loop.close()


def test_a_connection_that_somebody_else_has_taken_is_watched_no_more(broker: Broker, lines: list[Line]) -> None:
    """Between the end of one group and the next one a thread may publish over it."""
    loop = Watching()
    real = broker.send

    def taken(batch: Sequence[Publication]) -> Unconfirmed | None:
        lines[-1].is_busy = True
        return real(batch)

    async def main() -> None:
        loop.call_soon(broker.answer, 0)
        assert await broker.tasks.publish(batch("a"), 30.0) == [None]
        broker.send = taken  # type: ignore[method-assign]
        loop.call_soon(broker.answer, 1)
        assert await broker.tasks.publish(batch("b"), 30.0) == [None]
        await turn()
        assert loop.added == [lines[1].ours.fileno(), lines[0].ours.fileno()]
        assert loop.removed == loop.added

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


@pytest.mark.parametrize("end", ["stopped", "closed"])
def test_a_loop_that_ends_keeps_no_connection(broker: Broker, lines: list[Line], end: str) -> None:
    """Also in the round in which a message has been confirmed: whoever closes sees to it."""
    loop = Watching()

    async def main() -> None:
        assert await broker.tasks.publish(batch("a"), 30.0) == [None]

    def answer_and_stop() -> None:
        # The answer is found in the round in which the loop stops, and whoever waits for it not before the next one.
        broker.answer(0)
        loop.call_soon(loop.stop)

    commit = broker.tasks
    task = loop.create_task(main())
    loop.call_soon(answer_and_stop)
    loop.run_forever()
    assert not task.done()
    assert lines[-1].is_busy
    if end == "closed":
        task.cancel()
        loop.close()
    commit.close(20)
    assert not lines[-1].is_busy
    if end == "stopped":
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()
