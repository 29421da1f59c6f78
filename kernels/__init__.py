"""Numerics on one device. Knows tensors; never ranks, models or files."""

from kernels.linear_attention import linear_attention

__all__ = ["linear_attention"]
