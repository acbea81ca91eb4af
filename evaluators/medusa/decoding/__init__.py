"""Decoding loops, acceptance rules, key-value caches and CUDA graphs."""
