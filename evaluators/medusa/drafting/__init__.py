"""Drafters: heads and prompt lookup."""
