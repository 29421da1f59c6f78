"""Simulation: `python -m parallel simulate | show | published`, plans judged without a cluster.

Read in this order:

    models        sizes of models, and the FLOPs and bytes that follow
    lengths/      distributions of document lengths, a YAML file each
    case          one batch on a cluster, what a step of it costs, and the bound
    groups        steps in which groups of ranks share sequences in all layers
    strategies    one step of our plan and of each published alternative
    simulate      batches drawn and priced; the table, the JSON and the picture
    show          one batch's plan as text and as a picture
    published     what papers published, beside what these strategies take

May import `parallel.planning`, whose plans and prices are those of training, and `kernels.flops`.
No torch is imported.
"""
