"""Prepare data sets as MDS shards (`prepare`), and read batches from the shards (`streams`)."""
