"""Measures a checkpoint on disk: lm-eval scores and Medusa decode speed. Knows directories, never jobs."""
