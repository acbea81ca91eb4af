"""The base model: hidden states, caches, precision, packed weights."""
