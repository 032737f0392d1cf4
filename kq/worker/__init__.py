"""The worker: processes, signals, leases, settlement, limits."""
