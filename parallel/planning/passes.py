"""What passes over its tokens a fragment of a cut sequence makes more than a whole sequence would.

This is the one place that says so: `states` prices them, clusters say how long each takes, and
`tests/parallel/test_work_of_states.py` compares their work with what is executed. They are those
of `parallel.travel.chain`: only fragments in the middle of a sequence make any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from parallel.planning.layout import Array


class Passes(NamedTuple):
    """Numbers of passes, or seconds a token of each.

    Attributes:
        map: forward, what the op from zeros with its maps, and the state that enters later, take
            more than the op (`kernels.recurrences`: `begin`, `finish`).
        gradient: backward, the gradient of the entering state through the outputs
            (`begin_backward`).
    """

    map: Array | float
    gradient: Array | float


def passes_of(number: Array, last: Array) -> Passes:
    """Passes of fragments by their numbers in their sequences, (fragments,) int each.

    Args:
        last: number of the last fragment of the same sequence.
    """
    middle = (number > 0) & (number < last)
    return Passes(middle, middle)
