"""Numerics on one device. Knows tensors; never ranks, models or files."""

from kernels.convolution import short_convolution
from kernels.cross_entropy import linear_cross_entropy, token_cross_entropy
from kernels.diagonal_scan import diagonal_scan
from kernels.linear_attention import linear_attention
from kernels.norm import rms_norm
from kernels.rotary import rotary_embedding
from kernels.segments import apply_segment, compose_segments, segment_state
from kernels.softmax_attention import softmax_attention, softmax_attention_backward

__all__ = [
    "apply_segment",
    "compose_segments",
    "diagonal_scan",
    "linear_attention",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_embedding",
    "segment_state",
    "short_convolution",
    "softmax_attention",
    "softmax_attention_backward",
    "token_cross_entropy",
]
