"""Checkpoints and LoRA adapters as described by headers and configs, before a weight is read.

Only `pickled` reads weights, in a process of its own.
"""
