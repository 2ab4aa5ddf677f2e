"""Measures of speech, one file a metric; what needs an optional package imports it on first use."""
