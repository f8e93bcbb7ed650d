"""Data: anything to MDS shards (`prepare`), and shards to batches (`streams`)."""
