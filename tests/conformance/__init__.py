"""The contract of a backend: every test here runs on every broker.

Where a broker cannot do something its `Capabilities` say so, and the test asserts that they tell the truth.
"""
