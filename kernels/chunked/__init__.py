"""The ops in torch, a chunk or a tile at a time: time and memory grow linearly with the tokens.

The backend of machines without Triton, and the fast path of a CPU. Imports `kernels.packing` and
torch. Every file is tested against the definition in `kernels.reference`, or dense attention.
"""
