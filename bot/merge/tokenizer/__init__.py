"""What the output's vocabulary and chat template are, and which rows of which matrices its tokens take."""
