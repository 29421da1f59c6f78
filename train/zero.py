"""`deepspeed.initialize` for a model that is whole nowhere.

DeepSpeed takes a model with its weights on every rank, copies them into its own flat tensors, and
sends rank 0's to all others. Here it takes stand-ins: parameters of full shape over the memory of
one number. What it keeps is allocated as it takes them over, its content unset, and sent nowhere:
`train.engine.Engine.scatter` sets it, each rank its own part.

Read in DeepSpeed 0.19.8: `runtime/zero/stage_1_and_2.py` and `runtime/bf16_optimizer.py` flatten a
group of parameters at a time, `runtime/zero/partition_parameters.py` cuts up one after the other.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from parallel import World


def stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape, all of whose elements are one number in memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def quietly_initialise(
    model: nn.Module, optimizer: Any, settings: dict[str, Any], world: World
) -> Any:
    """`deepspeed.initialize` without its chatter, on the process group that there is.

    Parameters may be stand-ins, on the device and in the dtype of training.
    """
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime import bf16_optimizer, compiler
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero import stage_1_and_2
    from deepspeed.runtime.zero.partition_parameters import Init

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It prints how much memory is used before and after every group of parameters.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # Its Muon, which is not ours but imported, hands functions to torch.compile: that imports the
    # compiler, in a second of every rank.
    compiler.compile = lambda: lambda function: function
    # DeepSpeed calls torch by older names, which nobody who reads this can mend.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    # An all-reduce for CPU ranks that DeepSpeed would compile here, with a C++ compiler
    # that a newcomer need not have; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    stage_1_and_2._flatten_dense_tensors = _flattened
    bf16_optimizer._flatten_dense_tensors = _flattened
    Init._zero_init_param = _partition
    # Stage 0 in bf16 would make a step, with gradients of all parameters at once.
    FP16_UnfusedOptimizer.initialize_optimizer_states = lambda self: None
    deepspeed.DeepSpeedEngine._broadcast_model = lambda self: None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    gc.collect()  # circles of its objects keep what it worked on
    return engine


def _flattened(tensors: list[Tensor]) -> Tensor:
    """The tensors end to end, of stand-ins the memory alone."""
    if all(tensor.untyped_storage().nbytes() >= tensor.nbytes for tensor in tensors):
        return torch._utils._flatten_dense_tensors(tensors)
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    # What is no stand-in fills up the last partition.
    begin = 0
    for tensor in tensors:
        if not isinstance(tensor, nn.Parameter):
            flat[begin:][: tensor.numel()] = tensor.flatten()
        begin += tensor.numel()
    return flat


def _partition(init: Any, parameter: Any) -> None:
    """Stage 3: a stand-in for this rank's part of a parameter; DeepSpeed copies all parts into one
    flat tensor before it uses them.

    The parameter itself stays a stand-in until DeepSpeed has put its hooks on it. It would gather
    the whole model for that, one parameter after the other.
    """
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    init._convert_to_deepspeed_param(parameter)
    ranks = parameter.ds_zero_partition_world_size
    size = -(-parameter.ds_numel // ranks)
    part = stand_in(torch.Size([size]), parameter.dtype, init.local_device)
    part.ds_numel, part.final_location = size, None  # type: ignore[attr-defined]
    part.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
    parameter.ds_tensor, parameter.ds_numel_aligned = part, size * ranks
