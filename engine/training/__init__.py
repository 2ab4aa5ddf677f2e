"""Training: trainer, tasks, checkpoints, parallelism and export."""
