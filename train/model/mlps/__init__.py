"""MLPs: what a block does with each token by itself. One file each, beside `mixers/`."""
