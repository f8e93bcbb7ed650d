"""Data: anything -> MDS shards (`prepare`), shards -> batches (`streams`), and what happens to images on the way.

The modules are imported by name: `dataset` is light, `streams` brings torch and streaming along.
"""
