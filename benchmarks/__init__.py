"""Measurements, not tests: how fast the merge engine is, and how far it agrees with mergekit as a black box."""
