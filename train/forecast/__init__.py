"""What a run will need, said before it is queued: `python -m train plan`.

Nothing is computed and no GPU is asked. Memory is counted by running the model's own code on meta
tensors, which have shapes and no numbers; time is that of the planner's prices.
"""
