"""Simulation: `python -m parallel simulate | show | published`, plans judged without a cluster.

Read in this order:

    models        sizes of models, and the FLOPs and bytes that follow
    lengths/      distributions of document lengths, a YAML file each
    strategies    one step of our plan, of each published alternative, and the bound
    simulate      batches drawn and priced; the table, the JSON and the picture
    show          one batch's plan as text and as a picture

May import `parallel.planning`, whose plans and prices are those of training, and `kernels.flops`.
No torch is imported.
"""
