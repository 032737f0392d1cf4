"""The version, on its own so that packaging can read it without importing kq."""

__version__ = "0.1.0"
