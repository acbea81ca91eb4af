"""Plan + folders -> OUT: what computes a plan's steps, and the output's way onto the disk."""
