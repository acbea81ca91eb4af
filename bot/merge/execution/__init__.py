"""Execution of a plan: computes its steps and writes the output."""
