"""Whether a run fits into this machine: asked before it is made, and told when it did not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from data.config import RECALL
from data.settings import ConfigError
from parallel import World
from train.config import Config
from train.model.initial import without_values
from train.model.linear import Stacked
from train.model.transformer import Block

_FP32 = 4
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of a container, in /sys/fs/cgroup
_REFUSED = re.compile(r"can't allocate memory|out of memory|Storage size calculation overflowed")


def check(config: Config, world: World, dtype: torch.dtype) -> None:
    """Refuse a run that cannot fit, by what it needs at the very least.

    A rank holds its weights in `dtype` (of ZeRO 3, and of experts to which rows may travel, a
    share), a share of gradients and of the optimiser's three fp32 numbers a parameter, its share of
    each block's input, and all tokens and labels of a step. A GPU's machine holds only the latter.

    Raises:
        ConfigError: naming what is needed and what there is.
    """
    count = parameters(config)
    model, train = config.model, config.train
    shared = count if config.zero.stage == 3 else 0
    if shared == 0 and config.parallel.experts != "weights":
        shared = _of_experts(config)
    whole = count - shared + shared / world.size
    states = whole * dtype.itemsize + count * 3 * _FP32 / world.size
    activations = train.batch_tokens / world.size * model.layers * model.dim * dtype.itemsize
    step = 2 * 8 * train.batch_tokens * train.accumulate
    on_gpu = world.device.type == "cuda"
    host = step if on_gpu else states + activations + step
    places = [("machine", host * world.ranks_per_node, memory())]
    if on_gpu:
        held = torch.cuda.get_device_properties(world.device).total_memory
        places.append(("GPU", states + activations, held))
    for place, needed, held in places:
        if needed > held:
            raise ConfigError(
                f"training {count:,} parameters on batches of {train.batch_tokens:,} tokens "
                f"needs more than {needed / 1e9:,.0f} GB a {place}, and this one has "
                f"{held / 1e9:,.0f}; lower model.*, train.batch_tokens or train.accumulate, or "
                "take more ranks"
            )


@contextmanager
def told() -> Iterator[None]:
    """Memory that was not there is one line, not a traceback."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _REFUSED.search(str(error)):
            raise
        reason = (str(error).splitlines() or ["refused"])[0]
        raise ConfigError(
            f"there is not enough memory ({reason}); lower train.batch_tokens or model.*, set "
            "model.checkpoint_activations=true, or take more ranks"
        ) from error


def memory() -> int:
    """Bytes of this machine, or of the container that this process is in."""
    found = [psutil.virtual_memory().total]
    for name in _LIMITS:
        path = Path("/sys/fs/cgroup") / name
        if path.exists() and (text := path.read_text().strip()).isdecimal():
            found.append(int(text))
    return min(found)


def parameters(config: Config) -> int:
    """How many the model has at least, by the first block of each kind.

    Without its vocabulary where a tokenizer that is not looked at yet decides on that.
    """
    model, source = config.model, config.data.source
    pieces = config.data.vocab_size if config.data.tokenizer is None and source != RECALL else 1
    total = pieces * model.dim * (1 if model.tie_embeddings else 2)
    for count, block in _blocks(config):
        total += count * sum(parameter.numel() for parameter in block.parameters())
    return total


def _of_experts(config: Config) -> int:
    """How many of these are in experts' matrices."""
    return sum(
        count * part.weight.numel()
        for count, block in _blocks(config)
        for part in block.modules()
        if isinstance(part, Stacked)
    )


def _blocks(config: Config) -> Iterator[tuple[int, Block]]:
    """How many blocks there are of each kind, and the first one, on meta."""
    model = config.model
    for name, count in Counter(model.block_kinds).items():
        with without_values():
            block = Block(model, model.block_kinds.index(name))
        yield count, block
