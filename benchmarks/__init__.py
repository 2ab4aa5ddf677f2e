"""Programs that measure speed and memory; records are in results/."""
