"""Numerics on one device. Knows tensors; never ranks, models or files.

The front has one file for each op: its signature, its checks, and its torch form if that is short.

    linear_attention     every linear mixer: one recurrence with parts switched off
    reference            that recurrence, token by token: the definition
    segments             what a run of tokens does to the state that enters it
    diagonal_scan        the recurrence with an element-wise state
    recurrences          both in steps, for a caller that learns late what enters a segment
    convolution          the short causal convolution before a mixer
    softmax_attention    full attention, or in a sliding window; on a GPU by `flash`
    experts              MLPs of experts, rows sorted by expert
    norm, rotary, cross_entropy

Shared by them: `packing` (where sequences begin and end, dtypes of sums), `backend` (Triton or
torch), `flops` (work of an op). Beneath: `chunked/` in torch, `triton/` on a GPU; `tools/` checks,
compiles and times. Symbols everywhere: B batch rows, T tokens of one, N sequences, H heads (Hq of
queries, Hk of keys, Hv of values), D channels of a head (Dk of keys, Dv of values), C tokens of a
chunk, W taps of a filter, V vocabulary.
"""

from kernels.convolution import short_convolution
from kernels.cross_entropy import linear_cross_entropy, token_cross_entropy
from kernels.diagonal_scan import diagonal_scan
from kernels.experts import Activation, by_expert, expert_mlp
from kernels.linear_attention import linear_attention
from kernels.norm import rms_norm
from kernels.rotary import rotary_embedding
from kernels.segments import apply_segment, compose_segments
from kernels.softmax_attention import softmax_attention, softmax_attention_backward

__all__ = [
    "Activation",
    "apply_segment",
    "by_expert",
    "compose_segments",
    "diagonal_scan",
    "expert_mlp",
    "linear_attention",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_embedding",
    "short_convolution",
    "softmax_attention",
    "softmax_attention_backward",
    "token_cross_entropy",
]
