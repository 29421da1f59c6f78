"""The Triton kernels: one file an op, and what they share."""
