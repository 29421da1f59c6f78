"""Chunked: the recurrence and softmax attention in torch, a chunk or a tile at a time.

Memory grows linearly with the tokens. This is the backend of machines without Triton, and the fast
path of a CPU. Read in this order:

    decay               how a decay weighs pairs of tokens inside a chunk
    plan                where the chunks of packed sequences lie, and the order they are computed in
    terms               what a chunk computes from its tokens and the state that enters it
    linear_attention    the recurrence over these chunks, forward and backward
    softmax_attention   attention over tiles of queries and keys; by itself

May import `kernels.packing` and torch. Tests compare every file with the definition in
`kernels.reference`, or with dense attention.
"""
