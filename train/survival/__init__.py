"""What keeps a run alive: checkpoints, signals, bad steps, ranks that hang, the run's folder.

Imports `config` and `engine` of `train`; never the loop, which calls it.
"""
