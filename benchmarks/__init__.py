"""What things cost, as ratios to plain Celery: interleaved rounds, one server, one run. See `__main__`."""
