"""Evaluation of any system's outputs: which files belong together, measurements, statistics, and the report."""
