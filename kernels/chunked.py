"""The torch backend of `kernels.linear_attention`."""

from kernels.reference import linear_attention

__all__ = ["linear_attention"]
