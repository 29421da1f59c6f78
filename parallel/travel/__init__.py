"""Tensors between ranks, by the tables that a plan gives.

`exchange` sends rows and gives gradients back the way that they came; on it stand `chain` (states
of linear layers), `view` (a plan as one rank sees it), `rings`, `ulysses` and `attention`. Imports
`planning`, `peers` and the kernels; never layers or the stream, which stand on it.
"""
