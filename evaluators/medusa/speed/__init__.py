"""The speed test: what a tree costs, paired timing, the report."""
