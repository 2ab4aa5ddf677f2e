"""What `scripts/benchmark.py` measures, with the baselines; records are in results/."""
