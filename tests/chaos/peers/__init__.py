"""The same faults, against other task queues: Celery, Dramatiq and taskiq on Redis, and kq beside them.

``python -m tests.chaos.peers`` plays three faults (``faults``) on each of the peers (``peer``) and counts with the same
history and the same ledger as the suite itself. Nothing has to pass: the figures are reported. The peers are no
dependencies; install them with the extra ``chaos-peers``, best into an environment of their own.

An app and its publisher (``publish``) learn from ``KQ_TEST_CHAOS_URL``, ``KQ_TEST_CHAOS_QUEUE`` and
``KQ_TEST_CHAOS_HISTORY`` where their broker is, which queue is theirs, and where the history is written.
"""
