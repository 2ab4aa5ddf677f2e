"""Corpora: the synthetic one, and the preparation of real recordings as shards."""
