"""Sums over whole sequences, where ranks hold fragments of them."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from torch import Tensor

from parallel.peers import waiting_for
from parallel.travel.exchange import to_device
from parallel.travel.view import Shard, View


def sum_of_sequences(values: Tensor, shard: Shard) -> Tensor:
    """What all fragments of a sequence have together, for each fragment of this rank.

    One all-reduce of as many rows as the batch has cut sequences, and none if it has none; all
    ranks take part in it. It has no gradient.

    Args:
        values: (fragments of this rank, n), integers or floats.

    Raises:
        LostRankError: another rank is gone.
    """
    view = shard.view
    if view is None or not view.crossing:
        return values
    here, number = view.cached("sums of sequences", lambda: _cut(view))
    sums = values.new_zeros(len(view.plan.crossing), values.shape[1])
    sums.index_add_(0, number, values[here])
    with waiting_for(None):
        dist.all_reduce(sums, group=view.group)
    return values.index_copy(0, here, sums[number])


def _cut(view: View) -> tuple[Tensor, Tensor]:
    """This rank's fragments of cut sequences, and each one's number among these sequences."""
    stream, rows = view.plan.stream, np.concatenate(view.plan.crossing)
    number = np.repeat(
        np.arange(len(view.plan.crossing)), [len(each) for each in view.plan.crossing]
    )
    mine = stream.rank[rows] == view.rank
    here = rows[mine] - stream.rows(view.rank).start
    return to_device(here, view.device), to_device(number[mine], view.device)
