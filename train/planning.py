"""What the planner of full attention is told about a model."""

from __future__ import annotations

import torch

from parallel import FullAttention, ParallelConfig, Planner, World
from parallel.planning.clusters import slack
from parallel.planning.costs import States
from train.model.linear import Linear
from train.model.mixers import attention
from train.model.mixers._parts import LinearMixer
from train.model.transformer import Model

_FP32 = 4.0  # bytes of a number


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
    others = sum(mixer.mixing_flops([1]) for mixer in mixers if mixer not in full)
    return FullAttention(
        heads=fewest.heads,
        kv_heads=fewest.kv_heads,
        head_dim=fewest.head_dim,
        dim=model.config.dim if all(mixer.by_wave for mixer in full) else 0,
        number_bytes=dtype.itemsize,
        slack=_slack(model, full),
        alone=len(full) == len(mixers),
        states=_states(model, len(full)),
        rest_flops=(2.0 * model.matmul_parameters + others) / len(full),
    )


def _states(model: Model, full: int) -> States | None:
    """Of the layers on the one recurrence, of several kinds those of most numbers.

    A decay alone makes M a diagonal at most. Element-wise states are too small to count.
    """
    linear = [block.mixer for block in model.blocks if isinstance(block.mixer, LinearMixer)]
    if not linear:
        return None
    most = max(linear, key=lambda mixer: mixer.value_dim * mixer.head_dim)
    meanwhile = sum(part.out_features for part in most.children() if isinstance(part, Linear))
    return States(
        layers=len(linear) / full,
        heads=most.value_heads,
        M_bytes=_FP32 * most.head_dim * (most.head_dim if most.delta else 1),
        E_bytes=_FP32 * most.head_dim * most.value_head_dim,
        map_flops=most.mixing_flops([1]),
        beside_flops=2.0 * model.config.dim * meanwhile,
    )


def _slack(model: Model, full: list[attention.Mixer]) -> float:
    """How far memory lets tokens of full attention exceed the even share, on the safe side.

    A block leaves behind at least its input, that of its MLP and a norm's output, and three times
    the width of its MLP; where activations are made anew, its input, but for the block at work.
    """
    each = [2 * (mixer.heads + mixer.kv_heads) * mixer.head_dim for mixer in full]
    dim = model.config.dim
    blocks = [3 * (dim + block.mlp.out.in_features) for block in model.blocks]
    if model.config.checkpoint_activations:
        return slack(max(each), max(each), len(blocks) * dim + min(blocks))
    return slack(sum(each), max(each), sum(blocks))
