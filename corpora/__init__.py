"""Speech corpora: the synthetic corpus, and the preparation of recordings as shards."""
