"""`python -m kernels check | compile | bench`: the ops tried, compiled and timed on this machine.

May import everything in `kernels`; nothing imports it but the command.
"""
