"""The model: a list of blocks, each a mixer and an MLP."""
