"""Workers as processes: what they run, how they stop, and what happens when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.integration.conftest import LEASE, PATIENCE, Shop, children_of, command_line, is_alive, wait_for


def test_runs_retries_and_dead_letters(shop: Shop) -> None:
    """A worker handles messages, retries one until it succeeds, and dead-letters another."""
    worker = shop.worker("-p", "2")
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(20)])
    shop.app.publish(shop.queue, {"n": "flaky", "do": "fail", "times": 2})
    shop.app.publish(shop.queue, {"n": "bad", "do": "invalid"})
    shop.app.publish(shop.queue + "-async", {"n": "async"})

    shop.until("done", 22)
    wait_for(lambda: shop.app.info(shop.queue).dead == 1, "the dead letter")

    assert [line["attempt"] for line in shop.history("started", "flaky")] == [1, 2, 3]
    assert len(shop.history("started", "bad")) == 1
    assert shop.stop(worker) == 0
    assert shop.app.info(shop.queue).message_count == 0


def test_burst_ends_by_itself(shop: Shop) -> None:
    """With --burst a worker ends when its queues are empty."""
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(50)])
    shop.app.publish(shop.queue, {"n": "late"}, delay=0.5)
    worker = shop.worker("-p", "1", "--burst", ready=False)

    assert worker.wait(30) == 0
    assert len(shop.history("done")) >= 50


def test_term_lets_handlers_finish(shop: Shop) -> None:
    """On TERM what runs is finished, what waits goes back uncharged, nothing new starts, exit code 0."""
    worker = shop.worker("-p", "1", "-c", "1")
    shop.app.publish_many(shop.queue, [{"n": n, "do": "sleep", "seconds": 1.5} for n in range(4)])
    shop.until("started")

    assert shop.stop(worker) == 0

    assert len(shop.history("started")) == 1
    assert len(shop.history("done")) == 1
    wait_for(lambda: shop.app.info(shop.queue).ready == 3, "the rest to be back")
    shop.worker("-p", "2", "-c", "2")
    shop.until("done", 4)
    assert {line["attempt"] for line in shop.history("started")} == {1}


@pytest.mark.parametrize("pool", ["processes", "threads"])
def test_short_grace_releases(shop: Shop, pool: str) -> None:
    """A handler that outlives its grace is killed, and its message goes back at once and uncharged."""
    worker = shop.worker("-p", "1", "--pool", pool, "--grace", "0.5s")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 600})
    shop.until("started")
    started = monotonic()

    assert shop.stop(worker) == 0
    # The grace and a second, in which threads may end as well.
    assert monotonic() - started < 4

    shop.worker("-p", "1", "--grace", "0")
    again = shop.until("started", 2)
    assert [line["attempt"] for line in again] == [1, 1]


def test_second_signal_is_at_once(local_shop: Shop) -> None:
    """A second signal does not wait for handlers."""
    shop = local_shop
    worker = shop.worker("-p", "1", "--grace", "10m")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 600})
    shop.until("started")
    worker.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping" in shop.log(), "the worker to stop")

    assert shop.stop(worker, signal.SIGINT) == 0
    assert shop.app.info(shop.queue).ready == 1


def test_killed_child_is_replaced(shop: Shop) -> None:
    """A child that is killed is replaced; only what it ran is charged; the supervisor goes on."""
    worker = shop.worker("-p", "1", "-c", "1")
    shop.app.publish_many(shop.queue, [{"n": n, "do": "sleep", "seconds": 1} for n in range(3)])
    victim = shop.until("started")[0]
    os.kill(victim["pid"], signal.SIGKILL)

    shop.until("done", 3)

    attempts = {n: [line["attempt"] for line in shop.history("started", n)] for n in (0, 1, 2)}
    assert sorted(attempts[victim["n"]]) == [1, 2]
    assert all(tries == [1] for n, tries in attempts.items() if n != victim["n"])
    assert worker.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux only")
def test_first_children_are_forks_and_the_next_ones_are_fresh(local_shop: Shop) -> None:
    """Whichever they are, they load the app by themselves, handle, and are the supervisor's own children."""
    shop = local_shop
    worker = shop.worker("-p", "2", "-c", "1")

    def kinds() -> list[str]:
        """Return what the system shows of each: nobody is to take a child for a worker."""
        lines = [command_line(pid) for pid in shop.children(worker)]
        return sorted("other" if "kq.worker.child" not in x else "fork" if "forked" in x else "fresh" for x in lines)

    wait_for(lambda: kinds() == ["fork", "fork"], "the first children")
    shop.app.publish(shop.queue, {"n": "before"})
    (handled,) = shop.until("done")
    assert handled["pid"] in shop.children(worker)
    os.kill(handled["pid"], signal.SIGKILL)
    wait_for(lambda: kinds() == ["fork", "fresh"], "a new child")
    shop.app.publish_many(shop.queue, [{"n": n, "do": "sleep", "seconds": 0.5} for n in range(4)])
    shop.until("done", 5)
    assert {line["pid"] for line in shop.history("done")[1:]} == set(shop.children(worker))
    worker.send_signal(signal.SIGHUP)
    wait_for(lambda: kinds() == ["fresh", "fresh"], "fresh children")
    assert shop.stop(worker) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux only")
@pytest.mark.parametrize("text", ["{processes: 1}", "{processes: 3}", "{concurrency: 3}", "{pool: threads}"])
def test_forks_that_do_not_fit_are_ended(local_shop: Shop, text: str) -> None:
    """What the configuration file says is known later; there are as many children as it says, and no others."""
    shop = local_shop
    (shop.folder / "kq.yaml").write_text(f"worker: {text}\n")
    worker = shop.worker("--log-level", "info")
    expected = {"{processes: 1}": 1, "{processes: 3}": 3, "{pool: threads}": 0}.get(text, os.cpu_count())
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done")
    assert len(shop.children(worker)) == expected
    assert shop.stop(worker) == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_worker_needs_no_terminal(local_shop: Shop, closed: str) -> None:
    """It starts and works where standard streams are closed, as under some service managers."""
    shop = local_shop
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(20)])
    command = f"exec {sys.executable} -m kq worker shop:app -p 2 --burst {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=shop.folder, env=shop.environment, timeout=PATIENCE, check=False)
    assert done.returncode == 0
    assert len(shop.history("done")) == 20


def test_usr1_to_every_process_ends_none(local_shop: Shop) -> None:
    """The signal that asks a worker what runs is passed over by its children, fresh or not."""
    shop = local_shop
    worker = shop.worker("-p", "2", "-c", "1")
    first = shop.children(worker)
    os.kill(first[0], signal.SIGKILL)
    wait_for(lambda: len(shop.children(worker)) == 2 and shop.children(worker) != first, "a fresh child")
    shop.app.publish_many(shop.queue, [{"n": n, "do": "sleep", "seconds": 1} for n in range(2)])
    shop.until("started", 2)
    for pid in (worker.pid, *shop.children(worker)):
        os.kill(pid, signal.SIGUSR1)
    shop.until("done", 2)
    assert len(shop.history("started")) == 2
    assert {line["attempt"] for line in shop.history("started")} == {1}


def test_a_program_that_starts_a_worker_goes_on_once(local_shop: Shop) -> None:
    """The command's end is its caller's to handle, once, not in each child; and no child is a copy of that program."""
    shop = local_shop
    (shop.folder / "launcher.py").write_text(
        "import os, sys\n"
        "print('launched as', __name__, flush=True)\n"
        "from kq.cli import main\n"
        "try:\n"
        "    main(['worker', 'shop:app', '-p', '2', '--burst'])\n"
        "except SystemExit as end:\n"
        "    print('ended with', end.code, flush=True)\n"
        "finally:\n"
        "    print('goes on', flush=True)\n"
    )
    shop.app.publish_many(shop.queue, [{"n": 0, "do": "process"}, {"n": 1, "do": "process"}])
    done = subprocess.run(
        [sys.executable, "launcher.py"], cwd=shop.folder, env=shop.environment, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["launched as __main__", "ended with 0", "goes on"], done.stderr
    assert len(shop.history("done")) == 2


def test_killed_supervisor_leaves_no_orphan(shop: Shop) -> None:
    """When a supervisor is killed its children die with it, and another worker gets its messages uncharged."""
    worker = shop.worker("-p", "2")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 3})
    (first,) = shop.until("started")
    children = children_of(worker.pid)
    assert first["pid"] in children

    worker.kill()
    worker.wait()
    wait_for(lambda: not any(map(is_alive, children)), "the children to die", within=2 * LEASE)
    shop.worker("-p", "1")
    again = shop.until("started", 2)

    assert [line["attempt"] for line in again] == [1, 1]
    assert len(shop.until("done")) == 1


def test_long_task_runs_once(shop: Shop) -> None:
    """A task that takes longer than the lease is given to nobody else while its worker lives."""
    shop.worker("-p", "1")
    shop.worker("-p", "1")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 2.5 * LEASE})

    shop.until("done")

    assert len(shop.history("started")) == 1


@pytest.mark.parametrize(
    "poison",
    [
        {"do": "segfault"},
        {"do": "exit", "code": 0},
        pytest.param(
            {"do": "recurse"},
            marks=pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python makes an exception of it"),
        ),
    ],
)
def test_poison_ends_innocents_do_not(local_shop: Shop, poison: dict[str, object]) -> None:
    """A message that kills its process is started exactly max_crashes times; the others are all done."""
    shop = local_shop
    shop.app.publish_many(shop.queue, [{"n": n, "do": "sleep", "seconds": 0.05} for n in range(30)])
    shop.app.publish(shop.queue, {"n": "poison", **poison})
    shop.app.publish_many(shop.queue, [{"n": n, "do": "sleep", "seconds": 0.05} for n in range(30, 60)])
    shop.worker("-p", "2", "-c", "4")

    (letter,) = wait_for(lambda: shop.app.dead(shop.queue).list(), "the dead letter")
    wait_for(lambda: len({line["n"] for line in shop.history("done")}) == 60, "the innocents")

    assert len(shop.history("started", "poison")) == 3
    assert (letter.payload["n"], letter.reason, letter.attempts) == ("poison", "crash_loop", 3)
    assert "killed by signal" in letter.error_message or "exited with code 0" in letter.error_message
    assert shop.app.info(shop.queue).dead == 1
    assert {line["attempt"] for line in shop.history("done")} == {1}


def test_poison_on_every_broker(shop: Shop) -> None:
    """Crashes are counted by the broker, across workers."""
    shop.app.publish(shop.queue, {"n": "poison", "do": "segfault"})
    shop.worker("-p", "1")

    (letter,) = wait_for(lambda: shop.app.dead(shop.queue).list(), "the dead letter")

    assert (letter.reason, letter.attempts) == ("crash_loop", 3)
    assert len(shop.history("started")) == 3


def test_sys_exit_is_an_error_not_a_crash(local_shop: Shop) -> None:
    """sys.exit() in a handler is a failed attempt; the child lives."""
    shop = local_shop
    shop.worker("-p", "1")
    shop.app.publish(shop.queue, {"n": 1, "do": "sys.exit"})

    (letter,) = wait_for(lambda: shop.app.dead(shop.queue).list(), "the dead letter")

    assert (letter.reason, letter.attempts) == ("max_attempts", 4)
    assert len({line["pid"] for line in shop.history("started")}) == 1


def test_a_handler_that_holds_the_interpreter_is_killed(local_shop: Shop) -> None:
    """A time limit holds against code that nothing can interrupt; others of the process are not charged."""
    shop = local_shop
    shop.worker("-p", "1", "-c", "4")
    queue = shop.queue + "-limited"
    shop.app.publish(queue, {"n": "hold", "do": "hold"})

    (letter,) = wait_for(lambda: shop.app.dead(queue).list(), "the dead letter", within=40)

    assert (letter.reason, letter.error_kind, letter.attempts) == ("max_attempts", "TIMEOUT", 2)
    assert len(shop.history("started", "hold")) == 2
    assert "was killed by its worker (a handler went on 2 s beyond its time limit)" in shop.log()
    assert "signal 9" not in shop.log()


def test_hup_reloads_code(local_shop: Shop) -> None:
    """HUP replaces the children by ones that have loaded the code anew, without losing a message."""
    shop = local_shop
    worker = shop.worker("-p", "1")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 0.5})
    shop.until("started")
    source = shop.folder / "shop.py"
    source.write_text(source.read_text().replace("VERSION = 1", "VERSION = 22"))
    old = shop.children(worker)

    worker.send_signal(signal.SIGHUP)
    wait_for(lambda: shop.children(worker) and not set(old) & set(shop.children(worker)), "new children")
    shop.app.publish(shop.queue, {"n": 2})
    shop.until("done", n=2)

    assert [line["version"] for line in shop.history("done")] == [1, 22]
    assert {line["attempt"] for line in shop.history("started")} == {1}


def test_usr1_tells_what_runs(local_shop: Shop) -> None:
    """USR1 logs what runs where, with stacks."""
    shop = local_shop
    worker = shop.worker("-p", "1")
    id = shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 600})
    shop.until("started")

    worker.send_signal(signal.SIGUSR1)

    wait_for(lambda: "time.sleep(payload" in shop.log(), "the stack")
    assert f"holds 1 messages; running: {id} of {shop.queue} for " in shop.log()


def test_usr1_tells_where_a_coroutine_is(local_shop: Shop) -> None:
    """Down to what it waits for, not only where its task began."""
    shop = local_shop
    source = shop.folder / "shop.py"
    inner = "async def inner():\n    await asyncio.sleep(600)\n"
    outer = (
        "@app.consumer(QUEUE + '-slow')\nasync def outer(payload):\n    note('started', payload)\n    await inner()\n"
    )
    source.write_text(f"{source.read_text()}\n\n{inner}\n\n{outer}")
    worker = shop.worker("-p", "1", "--grace", "0")
    shop.app.publish(shop.queue + "-slow", {"n": 1})
    shop.until("started")
    worker.send_signal(signal.SIGUSR1)
    wait_for(lambda: "await asyncio.sleep(600)" in shop.log(), "the stack")
    assert "await inner()" in shop.log()


def test_only_chosen_queues_are_consumed(local_shop: Shop) -> None:
    """-Q consumes these queues only; one without a handler is named, and left alone."""
    shop = local_shop
    shop.app.publish(shop.queue + "-async", {"n": "other"})
    shop.worker("-p", "1", "-Q", f"{shop.queue},shop:nobody")
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done")

    assert shop.app.info(shop.queue + "-async").ready == 1
    assert "shop:nobody has no handler" in shop.log()


def test_threads_pool_works(shop: Shop) -> None:
    """--pool threads runs handlers in the supervisor's process, with the same results."""
    worker = shop.worker("--pool", "threads", "-c", "2")
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(10)])
    shop.app.publish(shop.queue, {"n": "flaky", "do": "fail", "times": 1})
    done = shop.until("done", 11)

    assert {line["pid"] for line in done} == {worker.pid}
    assert shop.stop(worker) == 0


def test_start_tells_what_a_person_needs(shop: Shop) -> None:
    """The start names app, broker without password, pool, queues and handlers."""
    worker = shop.worker("-p", "1", "-c", "3")
    log = shop.log()

    assert "1 processes x 3 handlers" in log
    assert f"{shop.queue}  ->  handle" in log
    assert "timeout 0.5 s" in log
    assert "guest:guest" not in log
    assert shop.stop(worker) == 0


def test_children_that_cannot_start_end_the_worker(local_shop: Shop) -> None:
    """Children that cannot load the app are tried again, ever later; then the worker gives up with 78."""
    shop = local_shop
    (shop.folder / "broken.py").write_text(
        "import sys\n"
        "if sys.argv[0].endswith('child.py'): raise RuntimeError('no children here')\n"
        "from shop import app\n"
    )
    shop.app.publish(shop.queue, {"n": 1})
    worker = shop.worker("-p", "1", app="broken:app")

    assert worker.wait(60) == 78
    assert "no children here" in shop.log()
    assert shop.app.info(shop.queue).ready == 1


def test_json_logs_are_json(local_shop: Shop) -> None:
    """--log-format json writes one object a line, with the action and the message's id."""
    import json

    shop = local_shop
    worker = shop.worker("-p", "1", "--log-format", "json", ready=False)
    id = shop.app.publish(shop.queue, {"n": 1, "do": "invalid"})
    wait_for(lambda: '"dead"' in shop.log(), "the dead letter's line")
    shop.stop(worker)
    lines = [json.loads(line) for line in shop.log().splitlines()]

    (line,) = [line for line in lines if line.get("action") == "dead"]
    assert line["message_id"] == id
    assert 'raise errors.Invalid("never")' in line["traceback"]


def test_term_to_every_process_is_term_to_the_worker(local_shop: Shop) -> None:
    """A service manager that sends TERM to all processes kills no handler: the supervisor lets it finish."""
    shop = local_shop
    worker = shop.worker("-p", "1")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 1})
    (first,) = shop.until("started")

    os.kill(first["pid"], signal.SIGTERM)
    assert shop.stop(worker) == 0

    assert [line["attempt"] for line in shop.history("done")] == [1]


def test_stopping_before_the_broker_is_there_is_a_stop(local_shop: Shop) -> None:
    """Whoever stops a worker that still tries to reach its broker has stopped it, and nothing has failed."""
    shop = local_shop
    worker = shop.worker("-p", "1", "-b", "redis://127.0.0.1:1", "--connect-timeout", "60s", ready=False)
    wait_for(lambda: "cannot reach the broker yet" in shop.log(), "a try")

    assert shop.stop(worker) == 0
    assert "stopped before the broker was reached" in shop.log()


def test_what_finishes_while_stopping_counts(local_shop: Shop) -> None:
    """A handler that ends after its grace but before the process is killed is done, not run again."""
    shop = local_shop
    worker = shop.worker("-p", "1", "--grace", "0.5s")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 1})
    shop.until("started")

    assert shop.stop(worker) == 0

    assert len(shop.history("done")) == 1
    assert shop.app.info(shop.queue).message_count == 0


def test_stopping_costs_no_cpu(local_shop: Shop) -> None:
    """A worker that waits for a handler to finish does not spin."""
    shop = local_shop
    worker = shop.worker("-p", "1")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 3})
    shop.until("started")
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in shop.log(), "the worker to stop")
    before = cpu_of(worker.pid)
    shop.until("done")

    assert cpu_of(worker.pid) - before < 0.5
    assert worker.wait(20) == 0


#: Holds an app up in the middle of being loaded, the first time, until somebody opens the gate.
GATE = """\
import os as _os

if _os.path.exists("gate"):
    open("loading", "w").close()
    with open("gate") as _gate:
        _gate.read()
    _os.unlink("gate")
"""


def worker_at_the_gate(shop: Shop) -> subprocess.Popen[str]:
    """Start a worker, and return once it loads its app."""
    os.mkfifo(shop.folder / "gate")
    source = shop.folder / "shop.py"
    source.write_text(GATE + source.read_text())
    worker = shop.worker("-p", "1", ready=False)
    wait_for((shop.folder / "loading").exists, "the app's code to run")
    return worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_still_loads_its_app_stops(local_shop: Shop, number: int) -> None:
    """As one that works does, and says so; it has nothing to finish."""
    worker = worker_at_the_gate(local_shop)
    assert local_shop.stop(worker, number) == 0
    assert "stopped before it had begun" in local_shop.log()


def test_a_worker_that_still_loads_its_app_reloads_it(local_shop: Shop) -> None:
    """HUP does not end it: it is done once there is something to reload. USR1 says where it is."""
    shop = local_shop
    worker = worker_at_the_gate(shop)
    worker.send_signal(signal.SIGUSR1)
    wait_for(lambda: "nothing runs yet" in shop.log(), "the stack")
    assert 'with open("gate")' in shop.log()
    worker.send_signal(signal.SIGHUP)
    (shop.folder / "gate").write_text("")
    wait_for(lambda: "replacing the children" in shop.log(), "the reload")
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done")
    assert shop.stop(worker) == 0


@pytest.mark.parametrize("pool", ["processes", "threads"])
def test_threads_that_an_app_does_not_end_hold_nothing_up(local_shop: Shop, pool: str) -> None:
    """Neither the end of a worker nor that of its children; and what the app prints at its end is no answer."""
    shop = local_shop
    source = shop.folder / "shop.py"
    source.write_text(
        source.read_text() + "\nimport atexit, threading\n"
        "threading.Thread(target=threading.Event().wait, name='stubborn').start()\natexit.register(print, 'bye')\n"
    )  # fmt: skip
    worker = shop.worker("-p", "1", "--pool", pool)
    if pool == "processes":
        old = shop.children(worker)
        worker.send_signal(signal.SIGHUP)
        wait_for(lambda: shop.children(worker) and not set(old) & set(shop.children(worker)), "new children")
        assert "replacing the children" in shop.log()
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done", n=1)

    assert shop.stop(worker) == 0
    assert f"not waiting any longer for threads that go on (stubborn); ending process {worker.pid}" in shop.log()
    assert "did not end in time" not in shop.log()


def test_an_app_that_hears_signals_is_not_cut_off_by_them(local_shop: Shop) -> None:
    """A service manager sends TERM to every process of a service; what runs is finished all the same."""
    shop = local_shop
    source = shop.folder / "shop.py"
    source.write_text(
        source.read_text() + "\nimport signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
    )
    worker = shop.worker("-p", "1")
    shop.app.publish(shop.queue, {"n": 1, "do": "sleep", "seconds": 1.0})
    shop.until("started", n=1)

    for pid in (*shop.children(worker), worker.pid):
        os.kill(pid, signal.SIGTERM)

    assert worker.wait(PATIENCE) == 0
    assert len(shop.history("done", n=1)) == 1
    assert shop.app.info(shop.queue).message_count == 0


def test_a_child_that_loads_something_else_than_its_worker_is_told_of(local_shop: Shop) -> None:
    """A worker goes by the limits of before until it hears HUP, whatever its children load when they are replaced."""
    shop = local_shop
    worker = shop.worker("-p", "1")
    old = shop.children(worker)
    wait_for(lambda: shop.children(worker), "a child")
    source = shop.folder / "shop.py"
    source.write_text(source.read_text().replace("timeout=0.5", "timeout=7.5"))
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done", n=1)
    os.kill(old[0], signal.SIGKILL)
    wait_for(lambda: "has loaded another configuration" in shop.log(), "the warning")
    assert shop.stop(worker) == 0


def test_a_worker_within_a_program_is_not_ended_by_a_reload(local_shop: Shop) -> None:
    """Nobody there would start it anew: it says what it cannot do, and goes on."""
    shop = local_shop
    program = shop.folder / "program.py"
    program.write_text(
        "import shop\nfrom kq.worker.log import configure\nconfigure('info', 'text', loaded=True)\n"
        "shop.app.worker(app_path='shop:app', processes=1).run()\n"
    )
    log = shop.log_of(0)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(program)],
            cwd=shop.folder,
            env=shop.environment,
            stdout=stderr,
            stderr=stderr,
            text=True,
        )
    shop.workers.append(process)
    wait_for(lambda: "kq worker of shop" in shop.log(), "its start")
    source = shop.folder / "shop.py"
    source.write_text(source.read_text().replace("timeout=0.5", "timeout=7.5"))
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: "nothing is reloaded: the app that shop:app names" in shop.log(), "the answer")
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done", n=1)
    assert shop.stop(process) == 0


def test_hup_with_broken_code_keeps_the_old(local_shop: Shop) -> None:
    """Children that cannot load the new code take nobody's place; the old ones work on."""
    shop = local_shop
    worker = shop.worker("-p", "1")
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done")
    source = (shop.folder / "shop.py").read_text()
    (shop.folder / "shop.py").write_text("1 / 0\n")

    worker.send_signal(signal.SIGHUP)
    wait_for(lambda: "nothing is reloaded" in shop.log(), "the failed start")
    shop.app.publish(shop.queue, {"n": 2})
    shop.until("done", n=2)
    (shop.folder / "shop.py").write_text(source.replace("VERSION = 1", "VERSION = 22"))
    worker.send_signal(signal.SIGHUP)
    wait_for(lambda: shop.log().count("nothing is reloaded") and len(shop.children(worker)) == 1, "one child")

    def new_code_runs() -> bool:
        shop.app.publish(shop.queue, {"n": "probe"})
        return any(line["version"] == 22 for line in shop.history("done"))

    wait_for(new_code_runs, "the new code")
    assert worker.poll() is None


def test_what_no_child_can_run_is_given_back(local_shop: Shop) -> None:
    """Where no child can be started any more, other workers get what this one has in hand."""
    shop = local_shop
    worker = shop.worker("-p", "1", "-c", "1")
    shop.app.publish_many(shop.queue, [{"n": n, "do": "sleep", "seconds": 1} for n in range(3)])
    victim = shop.until("started")[0]
    source = (shop.folder / "shop.py").read_text()
    (shop.folder / "shop.py").write_text("1 / 0\n")
    os.kill(victim["pid"], signal.SIGKILL)

    # After five tries, with longer and longer waits between them.
    wait_for(lambda: "next try in 8.0 s" in shop.log(), "the failed starts")
    wait_for(lambda: shop.app.info(shop.queue).in_flight == 0, "the messages to be back")
    assert worker.poll() is None
    (shop.folder / "shop.py").write_text(source)
    shop.worker("-p", "1")
    shop.until("done", 3)


def test_at_most_once_is_not_never(local_shop: Shop) -> None:
    """With auto_ack a graceful stop still runs what was acknowledged; nothing runs twice."""
    shop = local_shop
    queue = shop.queue + "-once"
    shop.app.publish_many(queue, [{"n": n, "seconds": 0.01} for n in range(300)])
    worker = shop.worker("-p", "2", "-c", "2")
    shop.until("started", 20)

    assert shop.stop(worker) == 0

    ran = [line["n"] for line in shop.history("done")]
    assert len(ran) == len(set(ran))
    assert len(ran) + shop.app.info(queue).message_count == 300


@pytest.mark.parametrize("first", ["children", "worker"])
def test_at_most_once_is_not_never_where_children_die_at_the_end(local_shop: Shop, first: str) -> None:
    """What was acknowledged and had not started when its child died runs in another one, before the worker ends."""
    shop = local_shop
    queue = shop.queue + "-once"
    shop.app.publish_many(queue, [{"n": n, "seconds": 0.1} for n in range(120)])
    worker = shop.worker("-p", "2", "-c", "2")
    shop.until("started", 20)
    children = shop.children(worker)
    if first == "worker":
        worker.send_signal(signal.SIGTERM)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    if first == "children":
        worker.send_signal(signal.SIGTERM)

    assert worker.wait(60) == 0

    ran = [line["n"] for line in shop.history("started")]
    assert len(ran) == len(set(ran))
    done = len(shop.history("done"))
    assert f"stopped: {done} done" in shop.log()
    # Those that ran in the children are told of, also where their handler had got no further than that.
    told = shop.log().count("had been settled, which stands")
    assert told <= 4
    assert done + told + shop.app.info(queue).message_count == 120


def test_at_most_once_is_told_of_what_never_ran(local_shop: Shop) -> None:
    """A second signal ends the worker at once: what it had acknowledged is lost then, and named."""
    shop = local_shop
    queue = shop.queue + "-once"
    shop.app.publish_many(queue, [{"n": n, "seconds": 5} for n in range(40)])
    worker = shop.worker("-p", "2", "-c", "2")
    shop.until("started", 4)
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: "a second signal" in shop.log(), "the first signal to be heard")
    worker.send_signal(signal.SIGTERM)

    assert worker.wait(30) == 0

    left = shop.app.info(queue).message_count
    assert left < 40
    assert shop.log().count("had been settled, which stands") == 40 - left
    assert "stopped: 0 done" in shop.log()


def cpu_of(pid: int) -> float:
    """Return the processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_closing_what_is_not_its_own_is_a_crash(local_shop: Shop) -> None:
    """A handler that closes its process's descriptors is charged with it, and ends after max_crashes starts."""
    shop = local_shop
    shop.worker("-p", "1", "-c", "2")
    shop.app.publish(shop.queue, {"n": "closer", "do": "close"})
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(20)])

    (letter,) = wait_for(lambda: shop.app.dead(shop.queue).list(), "the dead letter")

    assert (letter.reason, letter.crashes) == ("crash_loop", 3)
    # It ends by itself, or the supervisor, to whom it cannot speak any more, ends it.
    assert letter.exit_code == 1 or letter.exit_signal == signal.SIGKILL
    assert (letter.peak_memory or 0) > 10 * 2**20
    assert len(shop.history("started", "closer")) == 3
    wait_for(lambda: len({line["n"] for line in shop.history("done")}) >= 20, "the others")


def test_a_copy_of_the_process_settles_nothing(local_shop: Shop) -> None:
    """A handler that forks runs once, and so does what waits behind it, whatever its copy returns."""
    shop = local_shop
    shop.worker("-p", "1", "-c", "1")
    shop.app.publish(shop.queue, {"n": "forks", "do": "fork"})
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(10)])

    shop.until("done", 11)
    wait_for(lambda: shop.app.info(shop.queue).message_count == 0, "the end")

    assert len(shop.history("started")) == 11


def test_all_that_are_late_are_charged(local_shop: Shop) -> None:
    """When a process is killed for its time limit, every handler in it that is late has had its attempt."""
    shop = local_shop
    queue = shop.queue + "-limited"
    shop.app.publish_many(queue, [{"n": n, "do": "block"} for n in range(3)])
    shop.worker("-p", "1", "-c", "3")

    wait_for(lambda: len(shop.app.dead(queue).list()) == 3, "the dead letters")

    assert {letter.error_kind for letter in shop.app.dead(queue).list()} == {"TIMEOUT"}
    assert len(shop.history("started")) == 6


@pytest.mark.parametrize(("queue", "guilty"), [("-async-limited", "block"), ("-limited", "hold")])
def test_who_keeps_the_others_from_running_is_charged_alone(local_shop: Shop, queue: str, guilty: str) -> None:
    """By a blocked event loop, or a lock that all threads need: the limits of all pass, and one of them is late."""
    shop = local_shop
    queue = shop.queue + queue
    shop.app.publish_many(queue, [{"n": n, "seconds": 0.01} for n in range(3)])
    shop.app.publish(queue, {"n": "guilty", "do": guilty, "seconds": 0.05})
    shop.app.publish_many(queue, [{"n": n, "seconds": 0.3} for n in range(3, 6)])
    shop.worker("-p", "1", "-c", "8")

    (letter,) = wait_for(lambda: shop.app.dead(queue).list(), "the dead letter")
    wait_for(lambda: shop.app.info(queue).message_count == 0, "the others")

    assert (letter.payload["n"], letter.reason, letter.error_kind) == ("guilty", "max_attempts", "TIMEOUT")
    done = shop.history("done")
    # One that had just ended, and could not say so any more, has run again.
    assert {line["n"] for line in done} == set(range(6))
    assert {line["attempt"] for line in done} == {1}
    assert len(shop.app.dead(queue).list()) == 1
    # The first time in company, then alone.
    assert len(shop.history("started", "guilty")) <= 3


def test_a_child_whose_thread_has_broken_is_replaced(shop: Shop) -> None:
    """Where a thread cannot go on its process ends, and what it held runs elsewhere: nothing waits for ever."""
    shop.worker("-p", "1", "-c", "2")
    shop.app.publish(shop.queue, {"n": "broken", "do": "break"})
    shop.until("started", n="broken")
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(20)])

    shop.until("done", n=19)
    wait_for(lambda: shop.app.info(shop.queue).message_count == 0, "the end of all")

    assert {line["n"] for line in shop.history("done")} >= set(range(20))
    assert "a child cannot go on" in shop.log()


def test_new_children_work_while_old_ones_finish(local_shop: Shop) -> None:
    """After HUP messages run in the new children at once, however long handlers of the old ones take."""
    shop = local_shop
    worker = shop.worker("-p", "1", "-c", "2")
    shop.app.publish_many(shop.queue, [{"n": f"long-{n}", "do": "sleep", "seconds": 60} for n in range(2)])
    shop.until("started", 2)
    (old,) = shop.children(worker)
    worker.send_signal(signal.SIGHUP)
    wait_for(lambda: len(shop.children(worker)) == 2, "another child")
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(5)])

    shop.until("done", 5)

    assert old not in {line["pid"] for line in shop.history("done")}


def test_a_time_limit_strikes_between_calls_to_the_broker(shop: Shop) -> None:
    """A handler that is nearly always in a call to the broker is stopped at its limit; its process lives on."""
    worker = shop.worker("-p", "1")
    children = shop.children(worker)
    shop.app.publish(shop.queue, {"n": 1})
    shop.until("done")
    shop.app.publish(shop.queue + "-limited", {"n": "busy", "do": "look"})

    wait_for(lambda: len(shop.app.dead(shop.queue + "-limited").list()) == 1, "the dead letter")

    (letter,) = shop.app.dead(shop.queue + "-limited").list()
    assert (letter.error_kind, letter.crashes) == ("TIMEOUT", 0)
    assert shop.children(worker) == children


def test_children_are_recycled(local_shop: Shop) -> None:
    """With --max-tasks-per-child a child is replaced after so many messages, and none is lost or run twice."""
    shop = local_shop
    worker = shop.worker("-p", "1", "-c", "1", "--max-tasks-per-child", "5")
    (first,) = wait_for(lambda: shop.children(worker), "the child")
    shop.app.publish_many(shop.queue, [{"n": n} for n in range(5)])
    shop.until("done", 5)

    wait_for(lambda: first not in shop.children(worker), "another child")
    shop.app.publish(shop.queue, {"n": "last"})
    (last,) = shop.until("done", n="last")

    assert last["pid"] != first
    assert len(shop.history("started")) == 6


def test_what_waits_behind_slow_handlers_goes_to_who_is_idle(shop: Shop) -> None:
    """Although the handlers were fast before, so that their worker has taken a hundred of the slow ones by then."""
    payloads: list[dict[str, object]] = [{"n": n} for n in range(3000)]
    payloads += [{"n": n, "do": "sleep", "seconds": PATIENCE} for n in range(3000, 3100)]
    shop.app.publish_many(shop.queue, payloads)

    def slow() -> list[dict[str, Any]]:
        # Not all the others are done by then where a child has stood still: what goes back is the last on RabbitMQ.
        return [line for line in shop.history("started") if line["n"] >= 3000]

    shop.worker("-p", "1", "-c", "2", "--grace", "0")
    wait_for(lambda: len(slow()) == 2, "two slow handlers")
    (busy,) = {line["pid"] for line in slow()}

    shop.worker("-p", "1", "-c", "2", "--grace", "0")

    wait_for(lambda: len(slow()) == 4, "two slow handlers of another worker")
    assert sum(line["pid"] != busy for line in slow()) == 2
    assert "crash" not in shop.log()
