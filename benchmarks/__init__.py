"""How fast kq is, beside other task queues and beside a bare client, in one run on one machine.

``scripts/bench`` measures. A *contender* (`contender`) is a task queue on a broker with settings and a guarantee;
its app and its way to publish are in ``apps``. Handlers count what they do in memory that all processes share
(`tally`), so that nobody's broker is asked while it works. `measure` runs the processes and takes the figures that
the trials (`trial`, `scale`) ask for, `bare` moves the same bytes through a bare client, `report` has the tables and
the chart.
"""
