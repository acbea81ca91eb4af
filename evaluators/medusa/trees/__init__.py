"""Draft trees as values and as device tensors."""
