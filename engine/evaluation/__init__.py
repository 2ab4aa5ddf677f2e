"""Evaluation of the outputs of any system: pairing of files, measurements, statistics, and reports."""
