"""What the planner is told about a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from data.settings import ConfigError
from parallel import FullAttention, ParallelConfig, Planner, World
from parallel.planning.clusters import (
    MEMORY_SLACK,
    LinearLayers,
    Recurrent,
    Work,
    load_cluster,
    slack,
    zero_bytes,
)
from parallel.planning.layout import Topology
from parallel.planning.planner import with_speeds
from parallel.travel.homes import Homes
from train.config import Config
from train.experts import layers_of
from train.model.linear import Linear
from train.model.mixers import attention
from train.model.transformer import Block, Model

_LONG = 65536  # tokens of a sequence over which a window's work a token is averaged


def check(config: ParallelConfig, ranks: int) -> None:
    """Read the cluster that the settings name, and the speeds of ranks.

    Raises:
        ConfigError: there is no such cluster or rank, or its file or speed is wrong.
    """
    try:
        with_speeds(Topology(ranks, ranks), config.speeds)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.cluster is not None:
        try:
            load_cluster(config.cluster)
        except ValueError as error:
            raise ConfigError(f"parallel.cluster: {error}") from None


def by_rows(
    config: Config,
    model: Model,
    topology: Topology,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, bool]:
    """The MLPs to whose experts rows travel, by name, as `parallel.experts` says, and whether the
    counts of a batch may overrule that ("auto").

    "auto" compares what a rank should get in a forward and backward pass over its even share of a
    batch, if all experts are as likely: of rows, each to another node or rank and back, in both
    passes, with their experts' numbers and weights, and once more where activations are made anew;
    of weights what ZeRO brings. What replicas tell each other once a step is left out.
    """
    layers = layers_of(model)
    if config.parallel.experts != "auto":
        return dict.fromkeys(layers, False) if config.parallel.experts == "rows" else {}
    tokens = config.train.batch_tokens / topology.ranks
    passes = 3 if config.model.checkpoint_activations else 2
    found = {}
    for name, layer in layers.items():
        experts, _, width = layer.up.weight.shape
        visits = sum(Homes(experts, topology).visits(layer.chosen))
        row = passes * (2 * width * dtype.itemsize + 4 * layer.chosen)
        numbers = layer.up.weight.numel() + layer.out.weight.numel()
        weights = zero_bytes(numbers, dtype.itemsize, config.zero.stage, config.train.accumulate)
        if tokens * visits * row < weights * (1 - 1 / topology.ranks):
            found[name] = True
    if layers and topology.ranks > 1:
        say(
            f"rows travel to experts in {len(found)} of {len(layers)} layers, weights in the others"
        )
    return found


def planner_of(
    model: Model,
    config: ParallelConfig,
    world: World,
    dtype: torch.dtype,
    zero_stage: int = 0,
    accumulate: int = 1,
    at_home: int = 0,
) -> Planner:
    """The planner of a run, on each of its ranks, for settings that `check` passes.

    Args:
        accumulate, at_home: as of `described`.
    """
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    told = described(model, dtype, zero_stage, accumulate, at_home)
    return Planner(config, world.topology, told, device)


def described(
    model: Model, dtype: torch.dtype, zero_stage: int, accumulate: int = 1, at_home: int = 0
) -> FullAttention:
    """The model's layers: full attention (without a window), linear layers, all other work.

    Args:
        accumulate: batches of a step, over which what ZeRO sends once a step is spread.
        at_home: numbers of the experts' matrices to which rows travel, which ZeRO does not bring.
    """
    mixers = [block.mixer for block in model.blocks]
    full = [m for m in mixers if isinstance(m, attention.Mixer) and m.window is None]
    layers = max(1, len(full))
    fewest = min(full, key=lambda mixer: mixer.heads, default=None)
    weights = model.matrices - at_home
    if not model.config.tie_embeddings:
        weights += model.embedding.num_embeddings * model.config.dim
    return FullAttention(
        heads=fewest.heads if fewest else 0,
        kv_heads=fewest.kv_heads if fewest else 0,
        head_dim=fewest.head_dim if fewest else 0,
        dim=model.config.dim if full and all(mixer.by_wave for mixer in full) else 0,
        number_bytes=dtype.itemsize,
        slack=_slack(model, full) if full else MEMORY_SLACK,
        alone=len(full) == len(mixers),
        layers=layers,
        linear=_linear(model, layers, dtype),
        work=_work(model, full, dtype),
        zero_bytes=zero_bytes(weights, dtype.itemsize, zero_stage, accumulate),
    )


def _linear(model: Model, layers: int, dtype: torch.dtype) -> LinearLayers | None:
    """Of the layers on the one recurrence, of several kinds those of most numbers.

    Element-wise states are too small to count.
    """
    linear = [block.mixer for block in model.blocks if block.mixer.recurrent]
    if not linear:
        return None
    most = max(linear, key=lambda mixer: _numbers(mixer.recurrent))
    assert most.recurrent is not None
    beside = sum(part.out_features for part in most.children() if isinstance(part, Linear))
    filters = getattr(most, "conv", None)
    # Under ZeRO 3 a rank's parameters are empty between their uses.
    shape = (0, 1) if filters is None else getattr(filters, "ds_shape", filters.shape)
    channels, reach = shape[0], shape[1] - 1
    return LinearLayers(
        layers=len(linear) / layers,
        recurrence=most.recurrent,
        beside_flops=2.0 * model.config.dim * beside,
        halo_bytes=float(dtype.itemsize * reach * channels),
    )


def _numbers(of: Recurrent | None) -> int:
    """Numbers of a token's states."""
    return of.heads * of.key_dim * of.value_dim if of else 0


def _work(model: Model, full: list[attention.Mixer], dtype: torch.dtype) -> Work:
    """Everything but full attention."""
    others = [block.mixer for block in model.blocks if block.mixer not in full]
    windows = sum(
        mixer.mixing_flops(np.array([_LONG])) / _LONG for mixer in others if not mixer.recurrent
    )
    return Work(
        products=2.0 * model.matmul_parameters,
        recurrences=tuple(mixer.recurrent for mixer in others if mixer.recurrent),
        windows=windows,
        touched=dtype.itemsize * sum(_touched(block) for block in model.blocks),
    )


def _touched(block: Block) -> float:
    """Numbers a token that a block's norms, activations and residuals read and write, forward.

    Two norms and two residuals; what the MLP has between its projections; what the mixer projects
    (rotary embedding, a convolution) and its output (a norm, a gate).
    """
    given = sum(
        part.out_features
        for name, part in block.mixer.named_modules()
        if isinstance(part, torch.nn.Linear) and not name.endswith("out")
    )
    out = block.mixer.get_submodule("out")
    assert isinstance(out, torch.nn.Linear)
    return 10.0 * out.out_features + float(_inside(block)) + 2.0 * given + 3.0 * out.in_features


def _inside(block: Block) -> int:
    return 0 if block.mlp is None else block.mlp.inner


def _slack(model: Model, full: list[attention.Mixer]) -> float:
    """How far memory lets tokens of full attention exceed the even share, on the safe side.

    A block leaves behind at least its input, that of its MLP and a norm's output, and what the MLP
    has between its projections; where activations are made anew, its input, but for the block at
    work.
    """
    each = [2 * (mixer.heads + mixer.kv_heads) * mixer.head_dim for mixer in full]
    dim = model.config.dim
    blocks = [3 * dim + _inside(block) for block in model.blocks]
    if model.config.checkpoint_activations:
        return slack(max(each), max(each), len(blocks) * dim + min(blocks))
    return slack(sum(each), max(each), sum(blocks))
