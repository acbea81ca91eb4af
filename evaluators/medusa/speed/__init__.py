"""Speed test: cost of a tree, paired timing, report."""
