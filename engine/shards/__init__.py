"""Prepared samples in tar shards: what every process of a job writes, and what training reads."""
