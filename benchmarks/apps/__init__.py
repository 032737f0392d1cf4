"""An app for each contender: its handler, and how it publishes.

Each module makes its app from what the environment says (`benchmarks.work`) and has a function ``publisher`` that
returns a `benchmarks.apps.publishing.Publisher`.
"""
