"""From raw recordings to shards: sources, stages, and the job that runs them over many processes."""
