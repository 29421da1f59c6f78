"""MLPs: what a block does with each token by itself, (…, dim) -> (…, dim). A file each."""
