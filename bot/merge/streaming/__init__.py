"""Tools of the merge methods: inputs that arrive chunk by chunk, sums, selections, masks and sign election."""
