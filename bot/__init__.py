"""mergebot: asks, merges, evaluates, publishes."""

__version__ = "0.1.0"
