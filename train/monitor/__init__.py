"""What a run shows: the log, metrics.jsonl, TensorBoard, tables and figures.

Imports the settings in `config` and nothing else of `train`: it is told what it shows.
"""
