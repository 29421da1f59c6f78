"""`python -m train`, but one rank falls ill: `sick.py RANK BATCH ILLNESS CONFIG [key=value …]`."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import time
from typing import Any

from train.__main__ import main
from train.engine import Engine
from train.survival import stop

rank, chosen, illness = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
signals = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL, "interrupt": signal.SIGTERM}
if illness == "interrupt":
    stop._LONG_BATCH_S = -1  # all look inside batches
forward, batches = Engine.__call__, itertools.count(1)


def call(self: Engine, *inputs: Any) -> Any:
    """The forward pass; at the batch number `chosen` of those that train, not quite."""
    ill = self.model.training and next(batches) == chosen and self.world.rank == rank
    if ill and illness == "sleep":
        time.sleep(600)
    if ill and illness in signals:
        os.kill(os.getpid(), signals[illness])
    loss, nats = forward(self, *inputs)
    return loss * (math.nan if ill and illness == "poison" else 1.0), nats


Engine.__call__ = call  # type: ignore[method-assign]
sys.exit(main(sys.argv[4:]))
