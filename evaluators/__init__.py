"""Measurements of a checkpoint folder: lm-eval scores, sanity checks, Medusa decoding speed."""
