"""Planning: from a batch's sequence lengths to where every token lies, and what that costs.

Read in this order:

    layout      what a plan is: tables of spans, moves between two tables, rings
    heads       how a layer's heads are divided over ranks
    costs       what the planner knows of machine and model; cost formulas of a single transfer
    rings       what a plan's rings take, all of them at once
    cost        price of one full-attention layer under a plan
    passes      what a fragment of a cut sequence computes more than a whole one does
    passing     which rank sends which state of a linear layer to whom
    states      price of that
    prices      seconds of each sequence on each size of group, before anything is placed
    owners      which ranks attend to which sequence, and simple placings
    placing     the balanced placing: bin packing by time and memory
    building    the plan of a placing: attention's layout, its rings, the stream, the moves
    ordering    the stream's layout, near the ranks that attend to the tokens
    plan        several placings, built and priced; the cheapest is the plan
    planner     plans a run's batches in a thread, while the step before them runs
    described   what a YAML file says of a cluster, a model or lengths
    clusters/   machines as YAML files: speeds, links, memory, and where each number is from

Everything is numpy and a function of its arguments: no torch, no process group, no clock, so that
each rank computes the same plan by itself. May import `parallel.config` and nothing else of
`parallel` (`parallel.travel` and `parallel.simulation` import this room).
"""
