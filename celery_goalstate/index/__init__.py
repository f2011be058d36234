"""CORE 2: the dedupe index, in memory and on Redis. See `base`."""
