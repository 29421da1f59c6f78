"""When a run validates, and on what."""

from __future__ import annotations

from collections.abc import Iterable

import data
from train.config import Config, due


class Validation:
    """The validation batches of a run.

    Args:
        done: the steps that were evaluated before the run was resumed.
    """

    def __init__(self, config: Config, material: data.Material, done: Iterable[int]) -> None:
        self.config, self.material, self.done = config, material, set(done)
        self._cut_to, self._batches = 0, list[data.Batch]()

    def due(self, step: int) -> list[data.Batch]:
        """What to validate on after `step` steps: at first, after every `eval.every`-th and the
        last one; nothing where that was done before."""
        wanted = step in (0, self.config.train.steps) or due(step, self.config.eval.every)
        return self._held_out(step) if wanted and step not in self.done else []

    def forget_after(self, step: int) -> None:
        """Steps after this one will be made again."""
        self.done = {done for done in self.done if done <= step}

    def _held_out(self, step: int) -> list[data.Batch]:
        """Cut to the length that the last step was trained on."""
        config = self.config
        length = data.seq_len_at(config.data, config.train, max(step - 1, 0))
        if self._cut_to != length:
            self._batches = list(self.material.validation(config.eval.tokens, length))
            self._cut_to = length
        return self._batches
