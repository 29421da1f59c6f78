"""Triton: the ops' GPU kernels, forward and backward. On a CPU they run in Triton's interpreter.

The recurrence, in the order to read:

    tiles               loads, stores, gates and products of one chunk's tiles
    layout              where the chunks of packed sequences lie, found on the device
    intra               inside a chunk: A and Z
    forward, backward   the passes over a sequence, and the gradients
    linear_attention    launches these five kernels; `autograd.Function`
    mixers              the launches that are compiled ahead of time

By themselves: `diagonal_scan`, `convolution` (both on `sequences`), `norm`, `rotary`,
`cross_entropy` and `experts`. `launch` has every launch parameter and its reason. Each file with
kernels lists the launches it ships (`shipped`), for `python -m kernels compile`.

May import `kernels.packing`, torch and Triton.
"""

import os

# Multiply-adds may fuse, as they always did; Triton 3.9 warns if that is left open.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
