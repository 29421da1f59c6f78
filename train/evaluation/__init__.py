"""A model that is trained: loaded, measured, and asked for text.

Imports `model`, `engine`, `survival`, `monitor` and `pretrained`; never the loop.
"""
