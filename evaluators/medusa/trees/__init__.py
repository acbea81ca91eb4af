"""Draft trees: which guesses are tried together, as values and on the device."""
