"""Travel: tensors between ranks, as a plan's tables say.

Read in this order:

    exchange    send rows of a tensor to ranks; gradients return the same way
    chain       the states of linear layers, from fragment to fragment (`planning.passing`)
    view        a plan as one rank sees it: its fragments, chains and tables; `Shard`
    rings       softmax attention whose keys and values go round a ring
    ulysses     softmax attention with heads divided over all ranks, by all-to-all
    attention   full attention by the plan: moves there, whole sequences and rings, moves back
    homes       which ranks hold which experts
    rows        tokens to the homes of their experts and back, or the experts' matrices to all

Every table is made on the host before anything is sent, so both ends of a message know it, and no
device is waited for; but for `rows`, whose tables hang on what tokens choose: once a layer and pass
the host reads how much that is. May import `parallel.planning`, `parallel.config`, `parallel.peers`
and the kernels; not the front (`layers`, `stream`, `world`), which imports this room.
"""
