"""Whom to charge for a process that is gone, and who gets another chance. Decides only.

A process that dies by itself while one message runs died of that one. Of several each runs alone next, and only the one
that is there again is charged, for both times. It is likewise where a process had to be killed because somebody ran
past a time limit that nobody could be told of: one of them held up the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kq import errors
from kq.executor import timeout_outcome
from kq.outcome import Failure, Outcome
from kq.retry import RetryPolicy, after_crash
from kq.router import Consumer
from kq.worker.flight import Flight
from kq.worker.pool import Died

#: Returns by what rules a message runs.
Rules = Callable[[Flight], tuple[Consumer, RetryPolicy]]


class Finding(msgspec.Struct):
    """What is to become of the messages that a process had.

    Attributes:
        charged: Those that are charged with its end, each with its outcome.
        again: Those that wait again; each goes before all others, the last of them before all of these.
        over: Those that have been settled, which stands.
        suspects: Those of ``again`` of which one may have crashed the process: each runs alone next.
        held_up: Those of ``again`` of which one may have kept the others from running, past a limit: likewise.
        crashed: Whether the process has died by itself, and had begun with something.
    """

    charged: list[tuple[Flight, Outcome]] = msgspec.field(default_factory=list)
    again: list[Flight] = msgspec.field(default_factory=list)
    over: list[Flight] = msgspec.field(default_factory=list)
    suspects: list[Flight] = msgspec.field(default_factory=list)
    held_up: list[Flight] = msgspec.field(default_factory=list)
    crashed: bool = False


def examine(death: Died, running: Sequence[Flight], queued: Sequence[Flight], rules: Rules) -> Finding:
    """Find out what a process died of, and note on the others' accounts that they were near.

    Args:
        death: How it ended.
        running: What it had begun with.
        queued: What it had not begun with, in the order in which it was to.
        rules: Whose consumers' rules say what becomes of a charge.
    """
    has_begun = bool(running)
    if not has_begun and len(queued) == 1 and queued[0].may_be_guilty and not queued[0].settled:
        # It was given nothing else.
        running, queued = queued, []
    is_killed = bool(death.late or death.held_up)
    finding = Finding(crashed=bool(running) and not is_killed)
    for flight in reversed(queued):
        # Whom its worker has killed did not die of what it had not begun.
        flight.aboard += not is_killed
        (finding.over if flight.is_hopeless else finding.again).append(flight)
    finding.over += [flight for flight in running if flight.settled]
    left = [flight for flight in running if not flight.settled]
    is_one = len(running) == 1
    if is_killed:
        for flight in left:
            if flight.tag in death.late or (is_one and flight.tag in death.held_up):
                finding.charged.append((flight, _late(flight, rules)))
                continue
            if death.held_up and not is_one:
                flight.held_up += 1
                finding.held_up.append(flight)
            finding.again.append(flight)
    elif is_one and left:
        finding.charged.append((left[0], _crash(left[0], death, rules, has_begun=has_begun)))
    else:
        for flight in left:
            flight.suspected += 1
        finding.suspects += left
        finding.again += left
    return finding


def _late(flight: Flight, rules: Rules) -> Outcome:
    consumer, policy = rules(flight)
    delivery = flight.delivery
    return timeout_outcome(consumer, policy, attempts=delivery.attempts + flight.held_up, crashes=delivery.crashes)


def _crash(flight: Flight, death: Died, rules: Rules, *, has_begun: bool) -> Outcome:
    _, policy = rules(flight)
    delivery = flight.delivery
    what = "ran the handler" if has_begun else "was given the message, and had not begun with it,"
    failure = Failure(errors.INTERNAL, f"the process that {what} {death.how}", True, "", death.death)
    more = flight.suspected + 1
    return after_crash(failure, policy, attempts=delivery.attempts + more, crashes=delivery.crashes + more)
