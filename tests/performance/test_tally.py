from __future__ import annotations

import sys
from pathlib import Path
from threading import Barrier, Thread

from benchmarks.tally import Tally

THREADS = 16
EACH = 20
ROUNDS = 100


def test_threads_that_begin_together_are_all_counted(tmp_path: Path) -> None:
    """No thread counts where another one does: a message that is not counted would look like a lost one."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for n in range(ROUNDS):
            tally = Tally.create(tmp_path / str(n))
            together = Barrier(THREADS)

            def count(tally: Tally = tally, together: Barrier = together) -> None:
                together.wait()
                for _ in range(EACH):
                    tally.count()

            threads = [Thread(target=count) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert tally.read().done == THREADS * EACH
            tally.close()
    finally:
        sys.setswitchinterval(before)
