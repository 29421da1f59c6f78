"""The model: blocks of a mixer and an MLP, between an embedding and a head.

Read in this order:

    config         `ModelConfig`: its settings, read without torch
    transformer    the model itself: embedding, blocks, head
    mixers/        what mixes the tokens of a sequence: a file each, found by its name
    mlps/          what a block does with each token by itself
    balance        how even a model's experts are over a step: losses, updates of biases
    initial        what a parameter begins as: a function of seed, name and position
    norm           the RMSNorm of blocks, mixers and the model's end
    linear         a linear layer that can be applied in parts, while other parts travel

A new mixer is one file in `mixers/`; `mixers/__init__.py` says what a block expects of it. Shapes:
x is (1, t, dim) with the t tokens of this rank's shard, all its sequences end to end. May import
`kernels`, `parallel` and `data.settings`, and nothing else of `train`.
"""
