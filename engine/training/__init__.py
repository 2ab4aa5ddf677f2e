"""The trainer and what a run needs: tasks, checkpoints, parallelism, export."""
