"""AdamW and Muon over sharded parameters, and the learning rate of a step.

Imports `parallel`, and nothing else of `train`.
"""
