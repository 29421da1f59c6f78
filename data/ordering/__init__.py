"""What comes next: a function of corpus, seed and cursor alone.

`order` says which document is next, `mixture` from which source, `packing` and `balance` which
batch its pieces lie in; `plan` puts them together, window by window. Imports the settings, a batch
and the stored corpus.
"""
