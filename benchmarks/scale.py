"""What must not grow: the cost of a message with the backlog, the queues, headers, what waits, and with time.

For contenders that bend (`Contender.bends`). Each variation is measured right after the plain case and given as a
part of its rate: 1 means that it costs nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from benchmarks.contender import Contender
from benchmarks.measure import Bench
from benchmarks.publish import Order

#: Handlers sleep 10 ms: so many supervisors of one process each show what a broker serves, not what a core computes.
_SUPERVISORS: Final = (1, 2, 4, 8)
#: Messages for each supervisor.
_SHARE: Final = 2_000
#: Seconds that messages wait where they are to wait.
_FOR_LATER: Final = 600.0


def _rate(contender: Contender, url: str, messages: int, **bent: Any) -> float:
    with Bench(contender, url, **bent) as bench:
        bench.publish(Order(messages, "many"))
        return bench.drain(messages)["drain"]


def backlog(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Drain so many messages, and fifty times as many."""
    plain = _rate(contender, url, messages)
    return {"plain": plain, "backlog": _rate(contender, url, 50 * messages) / plain}


def queues(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Drain one queue, and a hundred of a thousand."""
    plain = _rate(contender, url, messages)
    return {"plain": plain, "queues": _rate(contender, url, messages, queues=100, declared=900) / plain}


def headers(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Drain messages without headers, and with thirty of them."""
    plain = _rate(contender, url, messages)
    return {"plain": plain, "headers": _rate(contender, url, messages, headers=30) / plain}


def priorities(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Drain messages of one priority, and of three."""
    plain = _rate(contender, url, messages)
    return {"plain": plain, "priorities": _rate(contender, url, messages, priorities=3) / plain}


def waiting(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Drain a queue, and one in which fifty times as many messages wait for their time."""
    plain = _rate(contender, url, messages)
    with Bench(contender, url) as bench:
        bench.publish(Order(50 * messages, "many", delay=_FOR_LATER))
        bench.publish(Order(messages, "many"))
        return {"plain": plain, "waiting": bench.drain(messages)["drain"] / plain}


def stages(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Drain fifteen times as many messages; the CPU that each costs in the supervisor and in the children."""
    with Bench(contender, url) as bench:
        bench.publish(Order(15 * messages, "many"))
        found = bench.drain(15 * messages)
    # Seconds per 1,000 are milliseconds each.
    return {"supervisor": 1000 * found["main"], "children": 1000 * (found["cpu"] - found["main"])}


def supervisors(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Drain with one supervisor of one process, with two, four and eight of them; handlers sleep 10 ms."""
    found = {}
    for number in _SUPERVISORS:
        command = [*contender.command]
        command[command.index("-p") + 1] = "1"
        several = replace(contender, command=tuple(command), copies=number)
        found[f"supervisors-{number}"] = _rate(several, url, _SHARE * number, work="sleep")
    return found


def endurance(contender: Contender, url: str, messages: int) -> dict[str, float]:
    """Handle 250 times as many messages with one worker; its memory after a tenth of them and at the end."""
    with Bench(contender, url) as bench:
        return bench.endure(250 * messages, 5 * messages)
