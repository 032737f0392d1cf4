"""Real worker processes, the real command line, real brokers."""
