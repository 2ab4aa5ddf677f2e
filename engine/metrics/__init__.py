"""Metrics of speech and video, one per file. Optional packages are imported on first use."""
