"""Preparation of recordings as shards: sources, stages, and the distributed job."""
