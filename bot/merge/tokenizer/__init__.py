"""Vocabulary and chat template of the output, and the sources of the rows of its tokens."""
