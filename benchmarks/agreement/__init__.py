"""How far mergebot and mergekit agree: the same recipes through both programs."""
