"""What passes over its tokens a fragment of a cut sequence makes, beside those of the op itself.

This is the one place that says so: `states` prices them, clusters say how long each takes, and
`tests/parallel/test_work_of_states.py` compares their work with what is executed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from parallel.planning.layout import Array


class Passes(NamedTuple):
    """Numbers of passes, or seconds a token of each.

    Attributes:
        state: the final state from zeros, which is E (`kernels.segments.final_state`), forward.
        map: M and E (`kernels.segments.segment_state`), forward.
        gradient: the final state from the state that entered, and its gradients: in the backward
            pass, forward and backward.
    """

    state: Array | float
    map: Array | float
    gradient: Array | float


def passes_of(number: Array, last: Array) -> Passes:
    """Passes of fragments by their numbers in their sequences, (fragments,) int each.

    The last fragment's map is wanted by nobody; no state enters the first one, so its M is not.

    Args:
        last: number of the last fragment of the same sequence.
    """
    leaves = number < last
    return Passes(leaves & (number == 0), leaves & (number > 0), leaves)
