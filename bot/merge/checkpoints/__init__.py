"""Checkpoints and LoRA adapters as described by headers and configs; no weights are read.

Only `pickled`, which runs in a child process, reads weights.
"""
