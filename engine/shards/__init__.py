"""Prepared samples in tar shards: writing during preparation, and reading during training."""
