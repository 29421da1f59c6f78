"""What the processes of tests have imported before they begin: see `tests.processes`.

Nothing of `kernels.triton`, which reads TRITON_INTERPRET when it is imported.
"""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401

import train.commands
import train.loop  # noqa: F401
from train.monitor import figures

# The fonts that figures are written in are found and read once.
figures.curves({"loss": {"1": 0.0}}, "", "").savefig(os.devnull, format="png")

# What is imported stays: no process looks through it for garbage, or copies its pages to do so.
gc.freeze()
