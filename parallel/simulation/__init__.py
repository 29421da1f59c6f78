"""`python -m parallel simulate | show`: plans judged and drawn without a cluster.

Imports `planning` alone, so what is judged is what training plans. `strategies` holds the
published alternatives, `models` and `lengths/` what they are compared on.
"""
