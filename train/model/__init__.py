"""The model: blocks of a mixer and an MLP between an embedding and a head.

`mixers/` and `mlps/` hold one file a kind, found by its name. Imports `kernels` and `parallel`, and
nothing else of `train`.
"""
