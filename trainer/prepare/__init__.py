"""Posts -> a set of shards, by any number of processes, restartable."""
