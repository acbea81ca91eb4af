"""What a model holds, told by its headers and config: checkpoints and LoRA adapters, before a weight is read.

Only `pickled` reads weights, in a process of its own.
"""
