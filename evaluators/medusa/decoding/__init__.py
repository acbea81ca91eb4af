"""From a prompt to tokens: the loop, its caches, the rules by which guesses stand."""
