"""Faults, counted: what was lost and what ran twice, on every broker, under each fault of a catalogue.

``history`` is what happened, written so that it survives whoever wrote it; ``ledger`` balances it. ``site`` is a
broker of our own that may be killed; ``stage`` is one run of one scenario on it: workers, publishers, and the
accounts at the end. The scenarios stand in ``*_faults.py``, ``hostile.py`` and ``endurance.py``; ``catalogue``
lists them, ``__main__`` is the command (``scripts/chaos``), and ``test_quick`` runs a selection with pytest.
"""
