"""Memory of a rank: the most that is held at a time in a step, and what it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.forecast.activations import EMBEDDING, LOSS, Part
from train.forecast.states import NOTHING, AtHome, States

WEIGHTS, GRADIENTS, OPTIMISER, BUFFERS = "weights", "gradients", "optimiser", "ZeRO's buffers"
BATCH = "batch"
AT_WORK = "at work"  # what the part that runs at the peak holds beside what it keeps
_INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Step:
    """A step of a model, as far as memory goes.

    Attributes:
        blocks: `ModelConfig.block_kinds`.
        parts: by name.
        states: of the rank.
        tokens: of the rank in a batch.
        accumulate: batches of the step.
        tied: whether the head is the embedding, whose gradient then is the sum of two.
        home: of the rank's experts that live at home.
    """

    blocks: Sequence[str]
    parts: Mapping[str, Part]
    states: States
    tokens: int
    accumulate: int
    tied: bool
    home: AtHome = NOTHING

    def peak(self) -> dict[str, float]:
        """Bytes at the moment when most are held, by kind; those of layers by their names.

        The moments looked at are those inside each part's forward pass, and its backward pass, and
        while gradients are reduced, and the optimiser steps.
        """
        states, home, order = self.states, self.home, [EMBEDDING, *self.blocks, LOSS]
        held = dict.fromkeys([WEIGHTS, OPTIMISER, GRADIENTS, BUFFERS, BATCH, *order], 0.0)
        held |= {
            WEIGHTS: states.weights + home.weights,
            OPTIMISER: states.optimiser + home.optimiser,
            GRADIENTS: states.gradients,
            BUFFERS: states.bucket if states.persistent else 0.0,
        }
        stepped = states.gradients + home.stepped
        found = [
            held | {GRADIENTS: stepped + states.reduced, AT_WORK: states.stepping},
            held | {GRADIENTS: stepped, AT_WORK: home.stepping},
        ]
        # Tokens, labels and positions.
        held |= {BATCH: 3.0 * _INDEX * self.tokens, BUFFERS: held[BUFFERS] + states.gathered}
        adding = self.accumulate > 1
        if adding:  # to those of the batches before
            held[GRADIENTS] += states.growing or states.reduced
            held[BUFFERS] += states.bucket if states.growing else 0.0  # is made but not used yet
            held[GRADIENTS] += sum(self.parts[name].at_home for name in order)
        for name in order:
            part = self.parts[name]
            found.append(held | {AT_WORK: part.forward})
            held[name] += part.kept + part.output
        if not states.persistent and not (adding and states.growing):
            held[BUFFERS] += states.bucket
        weights = sum(self._gradients(name) for name in order)
        waiting = 0.0
        for name in reversed(order):
            part = self.parts[name]
            held[name] -= part.output
            at_work = part.backward
            if adding:
                at_work = part.moving
            elif not states.growing:
                at_work = min(part.backward, part.moving + part.at_home)
            found.append(held | {AT_WORK: at_work})
            held[name] -= part.kept
            held[GRADIENTS] += 0.0 if adding else part.at_home
            if states.growing and not adding:
                held[GRADIENTS] += states.growing * self._gradients(name) / weights
            elif self.tied and name == LOSS:
                held[GRADIENTS] += part.gradients  # until the embedding's has come
            waiting += self._gradients(name)
            if states.bucket and waiting > states.bucket:
                found.append(self._reducing(held))
                waiting = 0.0
        found.append(self._reducing(held))
        reduced = 0.0 if states.growing else states.reduced
        found.append(held | {GRADIENTS: held[GRADIENTS] + reduced + home.reducing})
        return max(found, key=lambda moment: sum(moment.values()))

    def _reducing(self, held: dict[str, float]) -> dict[str, float]:
        states = self.states
        reduced = 0.0 if states.growing else states.reduced
        return held | {
            GRADIENTS: held[GRADIENTS] + reduced,
            BUFFERS: held[BUFFERS] + states.reducing,
        }

    def _gradients(self, name: str) -> float:
        return 0.0 if self.tied and name == EMBEDDING else self.parts[name].gradients
