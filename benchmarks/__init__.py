"""The benchmarks of `scripts/benchmark.py` and the baselines they compare with; records are in results/."""
