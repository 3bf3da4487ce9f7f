"""Tar shards to batches: the index, the order of samples, the reader, the loader, and the sources of images."""
