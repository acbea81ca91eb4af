"""The inputs of one step, read piece by piece: as stored, with a LoRA added, in the order of a vocabulary."""
