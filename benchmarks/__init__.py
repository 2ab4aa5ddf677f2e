"""Benchmarks of `scripts/benchmark.py` and their reference implementations. Records are in results/."""
