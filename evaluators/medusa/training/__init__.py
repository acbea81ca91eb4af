"""Heads from prompts: answers, features, losses, files."""
