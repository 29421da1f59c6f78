"""What the planner of full attention is told about a model."""

from __future__ import annotations

import torch

from parallel import FullAttention, ParallelConfig, Planner, World
from train.model.mixers import attention
from train.model.transformer import Model


def planner_of(model: Model, config: ParallelConfig, world: World, dtype: torch.dtype) -> Planner:
    """The planner of a run, on each of its ranks."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return Planner(config, world.topology, _full_attention(model, dtype), device)


def _full_attention(model: Model, dtype: torch.dtype) -> FullAttention | None:
    """The model's layers without a window; None if there are none."""
    mixers = [block.mixer for block in model.blocks]
    full = [m for m in mixers if isinstance(m, attention.Mixer) and m.window is None]
    if not full:
        return None
    fewest = min(full, key=lambda mixer: mixer.heads)
    return FullAttention(
        heads=fewest.heads,
        kv_heads=fewest.kv_heads,
        head_dim=fewest.head_dim,
        dim=model.config.dim if all(mixer.by_wave for mixer in full) else 0,
        number_bytes=dtype.itemsize,
        alone=len(full) == len(mixers),
    )
